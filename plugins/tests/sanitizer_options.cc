// Defaults of the address sanitizer for the tests. Without them it stops a program that asks for
// more memory than there is, instead of letting the allocation fail as it does elsewhere.

// The sanitizer's library looks the name up, so it must be visible.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "allocator_may_return_null=1";
}
