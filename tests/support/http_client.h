#pragma once
#include <chrono>
#include <optional>
#include <string>

namespace moemamba {

// A connection to a server of this machine, for tests: it sends what it is told, however wrong.
class HttpClient {
 public:
  // receive_buffer: bytes that the system keeps for it; 0: as ever.
  explicit HttpClient(int port, int receive_buffer = 0);
  HttpClient(const HttpClient&) = delete;
  HttpClient(HttpClient&& other) noexcept;
  ~HttpClient();

  bool send(const std::string& bytes);  // false: the other side has closed
  // What comes until the other side closes; nothing: it does not, within `most`.
  std::optional<std::string> read_all(std::chrono::seconds most = std::chrono::seconds(60));
  // One answer, with a body as long as its Content-Length says.
  std::string read_answer();
  // The other side has closed, or does within `most`.
  bool closed(std::chrono::milliseconds most);

 private:
  enum class Came { bytes, end, nothing };
  Came receive(std::chrono::milliseconds most);
  int socket_ = -1;
  std::string bytes_;
};

// The answer to one request on a connection of its own.
std::string http_get(int port, const std::string& target, const std::string& fields = "");

int http_status(const std::string& answer);        // 200; 0: that is no answer
std::string http_body(const std::string& answer);  // behind the header
std::string http_field(const std::string& answer, const std::string& name);

}  // namespace moemamba
