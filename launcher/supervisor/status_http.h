#pragma once
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

namespace moemamba {

// HTTP/1.1 as the status server speaks it (docs/status_server.md), without sockets: bytes of
// strangers in, a request or a refusal out. Narrower than the standard allows: what two programs
// might read in two ways is refused.

constexpr size_t kMostHeaderBytes = 8192;
constexpr int kMostHeaderFields = 100;

struct HttpRequest {
  bool head = false;       // HEAD; else GET
  std::string path;        // "/api/curves", as it was sent
  std::string query;       // what follows "?"
  std::string host;        // without its port; empty: HTTP/1.0 without one
  std::string bearer;      // of "Authorization: Bearer"
  bool keep_alive = true;  // the client's wish
};

struct HttpAnswer {
  int status = 200;
  std::string type = "text/plain; charset=utf-8";
  std::shared_ptr<const std::string> body;
  std::string fields;  // further ones, each with its CRLF
};
// An answer with one sentence; fields: as there.
HttpAnswer plain_answer(int status, std::string_view sentence, std::string fields = "");

// Status line and fields up to the empty line.
std::string header_of(const HttpAnswer& answer, bool keep_alive);

// Takes the bytes of one request. After a refusal the connection ends.
class RequestReader {
 public:
  RequestReader() { text_.reserve(512); }
  // Takes bytes up to the request's end; returns how many.
  size_t feed(std::string_view bytes);
  bool done() const { return result_.has_value(); }
  bool begun() const { return !text_.empty(); }
  const std::variant<HttpRequest, HttpAnswer>& result() const {
    return *result_;
  }  // REQUIRES: done

 private:
  void take(char c);
  void end_line();
  void finish();
  std::string text_;
  size_t line_ = 0;  // where the present one begins
  int lines_ = 0;
  std::optional<std::variant<HttpRequest, HttpAnswer>> result_;
};

// The value of `name` in a query ("from=10&token=x"), as it was sent; the first of several.
std::optional<std::string_view> query_value(std::string_view query, std::string_view name);

}  // namespace moemamba
