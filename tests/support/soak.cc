#include "tests/support/soak.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>

namespace moemamba {

namespace {

// The word behind `name` on the command line, or what follows "name=".
uint64_t number_of_option(const std::string& name, uint64_t otherwise) {
  std::ifstream words("/proc/self/cmdline", std::ios::binary);
  for (std::string word; std::getline(words, word, '\0');) {
    if (word == name && std::getline(words, word, '\0'))
      return std::strtoull(word.c_str(), nullptr, 10);
    if (word.rfind(name + "=", 0) == 0)
      return std::strtoull(word.c_str() + name.size() + 1, nullptr, 10);
  }
  return otherwise;
}

}  // namespace

int64_t soak_seconds() {
  return int64_t(number_of_option("--soak-seconds", 0));
}

uint64_t test_seed() {
  return number_of_option("--seed", 1);
}

void report_cases(const std::string& property, int64_t cases) {
  std::printf("cases: %s: %lld, seed %llu\n", property.c_str(), static_cast<long long>(cases),
              static_cast<unsigned long long>(test_seed()));
  std::fflush(stdout);
}

}  // namespace moemamba
