#pragma once
#include <exception>
#include <thread>
#include <vector>

#include "parallel/groups.h"

namespace moemamba {

// Runs body(rank) on `ranks` threads at once. What they throw comes out when all have ended: the
// first Error that is no PeerLost (which is a consequence, mostly), else the first PeerLost.
template <class Body>
void in_threads(int ranks, Body&& body) {
  std::vector<std::exception_ptr> errors(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r)
    threads.emplace_back([&, r] {
      try {
        body(r);
      } catch (...) {
        errors[size_t(r)] = std::current_exception();
      }
    });
  for (auto& thread : threads) thread.join();
  std::exception_ptr lost;
  for (const auto& error : errors) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const PeerLost&) {
      if (!lost) lost = error;
    }
  }
  if (lost) std::rethrow_exception(lost);
}

// Runs body(groups) as every rank of `layout`, each a thread. A rank that throws wakes the others.
template <class Body>
void in_world(const RankLayout& layout, Body&& body,
              std::chrono::milliseconds deadline = std::chrono::seconds(60)) {
  std::vector<ProcessGroups> groups = make_thread_groups(layout, deadline);
  in_threads(layout.ranks(), [&](int rank) {
    try {
      body(groups[size_t(rank)]);
    } catch (const std::exception& error) {
      groups[size_t(rank)].abort(error.what());
      throw;
    }
  });
}

}  // namespace moemamba
