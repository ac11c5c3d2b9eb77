#pragma once
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <functional>
#include <future>
#include <optional>
#include <string>
#include <thread>

#include "launcher/supervisor/status_server.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {

// A run that was made up: four ranks of two hosts in step 340 of 660, six layers of eight experts
// of which one is overloaded and one dead, a few events.
RunView scene_view();
// Any byte that there is, and what means something to HTML, JSON or JavaScript; in all its texts.
std::string weird_text();
void make_weird(RunView& view);
// Its metrics.jsonl, steps 0 to `steps` - 1; and what its model says, as samples.jsonl.
std::string scene_metrics(int64_t steps);
std::string scene_samples();

// A status server in this process, on a thread of its own, and the folder of its run.
class StatusScene {
 public:
  explicit StatusScene(StatusOptions options = {}, RunView view = scene_view());
  ~StatusScene();
  int port() const { return port_; }
  std::string url() const;
  const TemporaryFolder& folder() const { return *folder_; }  // REQUIRES: options named none
  // Changes what the server knows, on its thread.
  void change(const std::function<void(RunView& view)>& change);
  void stop();  // the server is gone afterwards

 private:
  std::optional<TemporaryFolder> folder_;
  RunView view_;
  boost::asio::io_context context_;
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_{
      context_.get_executor()};
  std::optional<StatusServer> server_;
  int port_ = 0;
  std::string url_;
  std::thread thread_;
};

}  // namespace moemamba
