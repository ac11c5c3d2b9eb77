#pragma once
#include <boost/asio/io_context.hpp>
#include <functional>
#include <memory>
#include <string>

#include "launcher/launch_config.pb.h"
#include "launcher/supervisor/run_view.h"

namespace moemamba {

struct StatusOptions {
  std::string run;  // folder whose metrics.jsonl and samples.jsonl are followed
  std::string address = "127.0.0.1";
  int port = 0;               // 0: any that is free
  std::string token;          // that requests must carry; empty: none
  double header_seconds = 5;  // from a connection's begin, or its latest answer, to a whole request
  double answer_seconds = 10;  // for an answer to be taken
  size_t connections = 64;     // of more, the one that has waited longest is cut off
};

// As the settings say. BadSettings where they do not fit each other, or the token's file is none.
// REQUIRES: launch.status_address is not empty.
StatusOptions status_options(const LaunchConfig& launch, const std::string& run);

// Shows a run to browsers and programs: page, /healthz, /metrics, /api (docs/status_server.md). It
// only reads. Answers are made on the context's thread, files are read on one of its own.
class StatusServer {
 public:
  // now: seconds as in RunView. BadSettings where it cannot listen. The context, the view and what
  // `now` needs must outlive it.
  StatusServer(boost::asio::io_context& context, StatusOptions options, const RunView& view,
               std::function<double()> now);
  ~StatusServer();  // closes all connections

  int port() const;
  bool asked_lately() const;  // within the latest ten seconds
  std::string url() const;    // "http://127.0.0.1:4711/"; without the token

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace moemamba
