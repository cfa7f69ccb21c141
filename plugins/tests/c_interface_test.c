/* The header in a C program, and the values that only a C caller can pass: any number is a value of
 * an enum in C. */
#include <stdio.h>
#include <string.h>

#include "lmkan/lookup2d.h"

enum { kGridPoints = 5, kOutputs = 2 };

static int failures = 0;

static void Expect(int condition, const char* what, int found, const char* message) {
  if (condition) return;
  ++failures;
  fprintf(stderr, "%s: found %d, message \"%s\"\n", what, found, message);
}

static lmkan_table_desc Describe(const float* data) {
  lmkan_table_desc desc;
  memset(&desc, 0, sizeof desc);
  desc.data = data;
  desc.dtype = LMKAN_FLOAT32;
  desc.num_pairs = 1;
  desc.num_grids = kGridPoints - 1;
  desc.num_outputs = kOutputs;
  return desc;
}

/* The middle of the grid must be `expected`, one value an output. */
static void TestLookup(const lmkan_table_desc* desc, const float* expected) {
  lmkan_cpu_table* table = NULL;
  char message[128] = "";
  lmkan_status status =
      lmkan_cpu_table_create(desc, LMKAN_COPY, LMKAN_ISA_AUTO, &table, message, sizeof message);
  Expect(status == LMKAN_OK && table != NULL, "create", (int)status, message);
  if (table == NULL) return;

  /* With G = 4 the origin is the grid point (2, 2). */
  const float x[2] = {0.0f, 0.0f};
  float y[kOutputs] = {-1.0f, -1.0f};
  status = lmkan_cpu_lookup2d(table, LMKAN_FLOAT32, x, y, 1, 0, 1, message, sizeof message);
  Expect(status == LMKAN_OK, "lookup", (int)status, message);
  for (int o = 0; o < kOutputs; ++o) Expect(y[o] == expected[o], "y", (int)y[o], "");

  const int dtypes[] = {LMKAN_INT8, 4, 7, 1000000, -1};
  for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; ++i) {
    message[0] = 0;
    status =
        lmkan_cpu_lookup2d(table, (lmkan_dtype)dtypes[i], x, y, 1, 0, 1, message, sizeof message);
    Expect(status == LMKAN_INVALID_ARGUMENT && strlen(message) > 10, "dtype of x", (int)status,
           message);
  }
  lmkan_cpu_table_destroy(table);
}

static void TestLookups(const float* data) {
  const float* middle = data + (2 * kGridPoints + 2) * kOutputs;
  lmkan_table_desc desc = Describe(data);
  TestLookup(&desc, middle);

  int8_t integers[kGridPoints * kGridPoints * kOutputs];
  for (size_t i = 0; i < sizeof integers; ++i) integers[i] = (int8_t)data[i];
  const float scales[kOutputs] = {0.5f, -3.0f};
  const float scaled[kOutputs] = {0.5f * middle[0], -3.0f * middle[1]};
  desc.data = integers;
  desc.dtype = LMKAN_INT8;
  desc.scales = scales;
  TestLookup(&desc, scaled);
}

static void ExpectRefusal(const lmkan_table_desc* desc, int ownership, int isa, const char* what) {
  lmkan_cpu_table* table = NULL;
  char message[128] = "";
  const lmkan_status status = lmkan_cpu_table_create(
      desc, (lmkan_ownership)ownership, (lmkan_isa)isa, &table, message, sizeof message);
  Expect(status == LMKAN_INVALID_ARGUMENT && table == NULL && strlen(message) > 10, what,
         (int)status, message);
  lmkan_cpu_table_destroy(table);
}

static void TestValuesOutsideOfTheEnums(const float* data) {
  const int values[] = {4, 7, 1000000, -1};
  for (size_t i = 0; i < sizeof values / sizeof values[0]; ++i) {
    lmkan_table_desc desc = Describe(data);
    ExpectRefusal(&desc, LMKAN_COPY, values[i], "instruction set");
    ExpectRefusal(&desc, values[i], LMKAN_ISA_AUTO, "ownership");
    desc.dtype = (lmkan_dtype)values[i];
    ExpectRefusal(&desc, LMKAN_COPY, LMKAN_ISA_AUTO, "dtype of the table");
  }
  /* The first value after the last one. */
  lmkan_table_desc desc = Describe(data);
  ExpectRefusal(&desc, LMKAN_BORROW + 1, LMKAN_ISA_AUTO, "ownership");
  desc.dtype = (lmkan_dtype)(LMKAN_INT8 + 1);
  ExpectRefusal(&desc, LMKAN_COPY, LMKAN_ISA_AUTO, "dtype of the table");
  desc.scales = data;
  ExpectRefusal(&desc, LMKAN_COPY, LMKAN_ISA_AUTO, "dtype of the table, with scales");
  desc = Describe(data);
  desc.scales = data;
  ExpectRefusal(&desc, LMKAN_COPY, LMKAN_ISA_AUTO, "scales of floats");
  desc.dtype = LMKAN_INT8;
  desc.scales = NULL;
  ExpectRefusal(&desc, LMKAN_COPY, LMKAN_ISA_AUTO, "INT8 without scales");
}

int main(void) {
  float data[kGridPoints * kGridPoints * kOutputs];
  for (size_t i = 0; i < sizeof data / sizeof data[0]; ++i) data[i] = (float)i;
  Expect(lmkan_abi_version() == LMKAN_ABI_VERSION, "ABI", (int)lmkan_abi_version(), "");
  TestLookups(data);
  TestValuesOutsideOfTheEnums(data);
  printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
