// Checks of the C++ tests: a failed one is printed and counted, and the test goes on.
#ifndef LMKAN_TESTS_CHECK_H_
#define LMKAN_TESTS_CHECK_H_

namespace lmkan::test {

// Exit status that CTest reports as skipped; see SKIP_RETURN_CODE in CMakeLists.txt.
inline constexpr int kSkipped = 77;

// Counts a failure and prints the first few. Safe to call from several threads.
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
void Fail(const char* file, int line, const char* condition, const char* format, ...);

// Prints the number of checks and failures and returns the exit status of the test.
int Finish();

// Counts a check that held.
void Pass();

}  // namespace lmkan::test

// Checks a condition; a format and its values say in which case it was checked. Evaluates to the
// condition.
#define LMKAN_EXPECT(condition, ...)           \
  ((condition) ? (::lmkan::test::Pass(), true) \
               : (::lmkan::test::Fail(__FILE__, __LINE__, #condition, __VA_ARGS__), false))

#endif  // LMKAN_TESTS_CHECK_H_
