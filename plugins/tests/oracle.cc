#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"

namespace lmkan::test {
namespace {

// Unit roundoff of float32, in which kernels find cells and add up corners.
constexpr double kRoundoff = 0x1p-24;

// Half of the smallest float32 times an entry of 128 and a weight of 1, together in units of 2^-22.
constexpr double kInt8Underflow = 0x1p-150 * 128 * 0x1p22;

double Sigma(double x) { return x <= 0 ? 0.5 * std::exp(x) : 1.0 - 0.5 * std::exp(-x); }

double InverseSigma(double level) {
  return level <= 0.5 ? std::log(2.0 * level) : -std::log(2.0 * (1.0 - level));
}

// Where a feature lies on its axis, and what float32 makes of that.
struct Position {
  int64_t cell;
  double d;       // the definition's d(x)
  double error;   // of d and of 1 - d
  double border;  // how far into the wrong cell rounding may put x; 0 away from the borders
};

Position Locate(const std::vector<double>& grid, double x) {
  const auto num_grids = static_cast<int64_t>(grid.size()) - 1;
  const double level = Sigma(x) * static_cast<double>(num_grids);
  Position position;
  position.cell = std::clamp<int64_t>(static_cast<int64_t>(std::floor(level)), 0, num_grids - 1);
  const double point = grid[position.cell];
  const double width = grid[position.cell + 1] - point;
  position.d = (x - point) / width;
  // One rounding each of the point, the difference, the width, the quotient, and of 1 - d.
  position.error = kRoundoff * (std::fabs(point) / width + 3 * std::fabs(position.d) +
                                std::fabs(1 - position.d));
  const double reach = 16 * kRoundoff * static_cast<double>(num_grids);
  const double nearest = std::nearbyint(level);
  const bool inner = nearest >= 1 && nearest <= static_cast<double>(num_grids - 1);
  position.border = inner && std::fabs(level - nearest) <= reach ? reach : 0;
  return position;
}

// How far from the definition's the weights of pair `pair` may be rounded.
double WeightRounding(const std::vector<Position>& positions, int64_t pair) {
  const int64_t begin = pair / kGroupPairs * kGroupPairs * 2;
  const int64_t end = std::min(begin + 2 * kGroupPairs, static_cast<int64_t>(positions.size()));
  double largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double distance = std::fabs(positions[i].d - 0.5);
    const double error = positions[i].error + kRoundoff;
    if (distance - error > kFarthestCoarseFit) return 0;
    largest = std::max(largest, distance + error > kFarthestFit ? 0x1p-12 : 0x1p-15);
  }
  return largest;
}

// The largest entry of each pair and output, [num_pairs][num_outputs].
std::vector<double> LargestEntries(const Shape& shape, const std::vector<double>& table) {
  std::vector<double> largest(shape.num_pairs * shape.num_outputs, 0.0);
  const int64_t pair_size = shape.table_size() / shape.num_pairs;
  for (int64_t i = 0; i < shape.table_size(); ++i) {
    double& most = largest[i / pair_size * shape.num_outputs + i % shape.num_outputs];
    most = std::max(most, std::fabs(table[i]));
  }
  return largest;
}

}  // namespace

std::string Shape::ToString() const {
  return std::to_string(num_pairs) + " pairs, G " + std::to_string(num_grids) + ", " +
         std::to_string(num_outputs) + " outputs, " + std::to_string(rows) + " rows";
}

double GridPoint(int64_t num_grids, int64_t index) {
  const auto inner = [num_grids](int64_t i) {
    return InverseSigma(static_cast<double>(i) / static_cast<double>(num_grids));
  };
  if (index == 0) return 2 * inner(1) - inner(2);
  if (index == num_grids) return 2 * inner(num_grids - 1) - inner(num_grids - 2);
  return inner(index);
}

Reference Evaluate(const Shape& shape, const std::vector<double>& x,
                   const std::vector<double>& table, lmkan_dtype table_dtype) {
  std::vector<double> grid;
  for (int64_t i = 0; i <= shape.num_grids; ++i) grid.push_back(GridPoint(shape.num_grids, i));
  const int64_t outputs = shape.num_outputs;
  const std::vector<double> largest = LargestEntries(shape, table);

  Reference reference;
  reference.y.assign(shape.y_size(), 0.0);
  reference.bound.assign(shape.y_size(), 0.0);
  const int64_t axis = shape.num_grids + 1;
  const double terms = 4.0 * static_cast<double>(shape.num_pairs);
  std::vector<Position> positions(2 * shape.num_pairs);
  for (int64_t r = 0; r < shape.rows; ++r) {
    double* y = reference.y.data() + r * outputs;
    double* bound = reference.bound.data() + r * outputs;
    const auto features = x.begin() + r * 2 * shape.num_pairs;
    if (!std::all_of(features, features + 2 * shape.num_pairs,
                     [](double feature) { return std::isfinite(feature); })) {
      std::fill_n(y, outputs, std::numeric_limits<double>::quiet_NaN());
      continue;
    }
    for (int64_t i = 0; i < 2 * shape.num_pairs; ++i) positions[i] = Locate(grid, features[i]);
    for (int64_t p = 0; p < shape.num_pairs; ++p) {
      const Position& first = positions[2 * p];
      const Position& second = positions[2 * p + 1];
      const double rounding = table_dtype == LMKAN_INT8 ? WeightRounding(positions, p) : 0;
      // In the wrong cell the line of the neighbour is followed, over this part of a cell at most.
      const double border = 4 * (first.border * (std::fabs(1 - second.d) + std::fabs(second.d)) +
                                 second.border * (std::fabs(1 - first.d) + std::fabs(first.d)));
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t up1 = corner / 2;
        const int64_t up2 = corner % 2;
        const double w1 = up1 == 1 ? first.d : 1 - first.d;
        const double w2 = up2 == 1 ? second.d : 1 - second.d;
        const double* entries =
            table.data() + ((p * axis + first.cell + up1) * axis + second.cell + up2) * outputs;
        const double weight = w1 * w2;
        // The axes' errors, the product's rounding, that of every addition, and of the weight.
        const double error = std::fabs(w1) * second.error + std::fabs(w2) * first.error +
                             first.error * second.error +
                             kRoundoff * (terms + 3) * std::fabs(weight) + rounding;
        // A scale in units of the weights may be subnormal where the scale itself isn't.
        const double underflow =
            table_dtype == LMKAN_INT8 ? (std::fabs(weight) + rounding) * kInt8Underflow : 0;
        for (int64_t o = 0; o < outputs; ++o) {
          y[o] += weight * entries[o];
          bound[o] += error * std::fabs(entries[o]) + underflow;
        }
      }
      for (int64_t o = 0; o < outputs; ++o) bound[o] += border * largest[p * outputs + o];
    }
    // A tenth for the terms of second order; each product may also fall among the subnormals.
    for (int64_t o = 0; o < outputs; ++o) bound[o] = 1.1 * bound[o] + terms * 0x1p-149;
  }
  return reference;
}

void ExpectClose(const Shape& shape, const Reference& reference, const Array& y,
                 const std::string& label) {
  for (int64_t i = 0; i < shape.y_size(); ++i) {
    const double found = y.Get(i);
    const double expected = reference.y[i];
    bool close;
    if (std::isnan(expected)) {
      close = !std::isfinite(found);
    } else {
      // Rounding is monotonic: what lies between two numbers lies between them when rounded too.
      close = found >= Round(y.dtype(), expected - reference.bound[i]) &&
              found <= Round(y.dtype(), expected + reference.bound[i]);
    }
    if (close) continue;
    LMKAN_EXPECT(close, "%s; y[%lld][%lld] is %.9g, the definition gives %.9g +- %.2g",
                 label.c_str(), static_cast<long long>(i / shape.num_outputs),
                 static_cast<long long>(i % shape.num_outputs), found, expected,
                 reference.bound[i]);
    return;
  }
  Pass();
}

}  // namespace lmkan::test
