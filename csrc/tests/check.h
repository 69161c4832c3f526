// A test is a function; CHECK reports what did not hold and the run goes on.
#pragma once

#include <cstdio>
#include <string>

namespace checks {

inline int failures = 0;

inline void report(bool holds, const char* what, const char* file, int line,
                   const std::string& where) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: does not hold: %s [%s]\n", file, line, what, where.c_str());
}

}  // namespace checks

#define CHECK(condition, where) checks::report((condition), #condition, __FILE__, __LINE__, where)
