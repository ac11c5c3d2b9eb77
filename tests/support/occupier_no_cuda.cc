#include "core/error.h"
#include "tests/support/occupier.h"

namespace moemamba {

struct Occupier::Work {};
Occupier::Occupier(uint64_t) { throw Error("no CUDA in this build: nothing to occupy"); }
Occupier::~Occupier() = default;
int64_t Occupier::launches() const { return 0; }
std::string Occupier::failure() const { return ""; }

}  // namespace moemamba
