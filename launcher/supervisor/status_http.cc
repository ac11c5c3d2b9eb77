#include "launcher/supervisor/status_http.h"

#include <boost/asio/buffer.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/parser.hpp>

#include "core/error.h"

namespace moemamba {

namespace {

namespace http = boost::beast::http;

HttpAnswer refusal(int status, std::string_view sentence, std::string fields = "") {
  return plain_answer(status, sentence, std::move(fields));
}

const char* name_of_status(int status) {
  const http::status known = http::int_to_status(unsigned(status));
  return known == http::status::unknown ? "Unknown" : http::obsolete_reason(known).data();
}

// "Host: name:port" -> name, in lower case; nothing: it is no host.
std::optional<std::string> host_name(std::string_view host) {
  const size_t bracket = host.find(']');
  const bool v6 = !host.empty() && host.front() == '[' && bracket != std::string_view::npos;
  const size_t colon = host.find(':', v6 ? bracket : 0);
  std::string_view name = host.substr(0, colon);
  const std::string_view port = colon == std::string_view::npos ? "" : host.substr(colon + 1);
  if (name.empty() || port.size() > 5) return std::nullopt;
  if (port.find_first_not_of("0123456789") != std::string_view::npos) return std::nullopt;
  std::string lower;
  for (const char c : v6 ? name.substr(1, name.size() - 2) : name) {
    const char l = c >= 'A' && c <= 'Z' ? char(c - 'A' + 'a') : c;
    const bool fits = (l >= 'a' && l <= 'z') || (l >= '0' && l <= '9') || l == '.' || l == '-' ||
                      l == '_' || (v6 && l == ':');
    if (!fits) return std::nullopt;
    lower += l;
  }
  if (v6 && bracket + 1 != name.size()) return std::nullopt;
  return lower;
}

using Message = http::request_parser<http::empty_body>::value_type;

// What a request without a body must not say about one.
std::optional<HttpAnswer> body_problem(const Message& message) {
  if (message.count(http::field::transfer_encoding) > 0)
    return refusal(400, "A request with Transfer-Encoding is not taken.");
  const auto lengths = message.count(http::field::content_length);
  if (lengths > 1) return refusal(400, "More than one Content-Length.");
  if (lengths == 0) return std::nullopt;
  const auto length = message[http::field::content_length];
  if (length.empty() || length.find_first_not_of("0123456789") != length.npos)
    return refusal(400, "Content-Length is no number.");
  if (length.find_first_not_of('0') != length.npos)
    return refusal(413, "A request must have no body.");
  return std::nullopt;
}

std::optional<HttpAnswer> take_target(std::string_view target, HttpRequest& request) {
  if (target.empty() || target.front() != '/' || target.find('#') != target.npos)
    return refusal(400, "The target must be a path that begins with \"/\".");
  if (target.size() > 2048) return refusal(414, "The target is longer than 2048 bytes.");
  const size_t mark = target.find('?');
  request.path = target.substr(0, mark);
  if (mark != target.npos) request.query = target.substr(mark + 1);
  return std::nullopt;
}

std::optional<HttpAnswer> take_host(const Message& message, HttpRequest& request) {
  const auto hosts = message.count(http::field::host);
  if (hosts == 0 && message.version() == 10) return std::nullopt;
  if (hosts != 1) return refusal(400, "There must be one Host.");
  const auto host = message[http::field::host];
  const std::optional<std::string> name = host_name({host.data(), host.size()});
  if (!name) return refusal(400, "Host is none.");
  request.host = *name;
  return std::nullopt;
}

std::variant<HttpRequest, HttpAnswer> request_of(const Message& message) {
  if (message.method() != http::verb::get && message.method() != http::verb::head)
    return refusal(405, "GET and HEAD alone are answered here.", "Allow: GET, HEAD\r\n");
  HttpRequest request{.head = message.method() == http::verb::head};
  if (const auto problem = body_problem(message)) return *problem;
  if (message.count(http::field::expect) > 0)
    return refusal(417, "There is nothing to expect: a request has no body.");
  const auto target = message.target();
  if (const auto problem = take_target({target.data(), target.size()}, request)) return *problem;
  if (const auto problem = take_host(message, request)) return *problem;
  if (message.count(http::field::authorization) > 1)
    return refusal(400, "More than one Authorization.");
  const auto authorization = message[http::field::authorization];
  if (authorization.size() > 7 && boost::beast::iequals(authorization.substr(0, 7), "bearer "))
    request.bearer.assign(authorization.data() + 7, authorization.size() - 7);
  request.keep_alive = message.keep_alive();
  return request;
}

}  // namespace

HttpAnswer plain_answer(int status, std::string_view sentence, std::string fields) {
  return {.status = status,
          .body = std::make_shared<const std::string>(concat(sentence, "\n")),
          .fields = std::move(fields)};
}

std::string header_of(const HttpAnswer& answer, bool keep_alive) {
  return concat("HTTP/1.1 ", answer.status, " ", name_of_status(answer.status),
                "\r\nContent-Type: ", answer.type, "\r\nContent-Length: ", answer.body->size(),
                "\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
                "Referrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n"
                "X-Frame-Options: DENY\r\n",
                answer.fields.find("Content-Security-Policy") == std::string::npos
                    ? "Content-Security-Policy: default-src 'none'; frame-ancestors 'none'\r\n"
                    : "",
                answer.fields, "Connection: ", keep_alive ? "keep-alive" : "close", "\r\n\r\n");
}

size_t RequestReader::feed(std::string_view bytes) {
  size_t taken = 0;
  while (!done() && taken < bytes.size()) take(bytes[taken++]);
  return taken;
}

// Line ends are looked at here, as they are sent, for Beast takes folded lines.
void RequestReader::take(char c) {
  if (text_.size() == kMostHeaderBytes) {
    result_ = refusal(431, concat("The header is longer than ", kMostHeaderBytes, " bytes."));
    return;
  }
  const bool after_cr = text_.size() > line_ && text_.back() == '\r';
  const auto byte = static_cast<unsigned char>(c);
  if (after_cr != (c == '\n'))
    result_ = refusal(400, "Lines must end with CR LF, and neither stands alone.");
  else if (byte >= 0x7f || (byte < 0x20 && c != '\r' && c != '\n' && c != '\t'))
    result_ = refusal(400, "The header has bytes that are no text.");
  else if (text_.size() == line_ && lines_ == 0 && (c < 'A' || c > 'Z'))
    result_ = refusal(400, "A request begins with its method.");
  else if (text_.size() == line_ && lines_ > 0 && (c == ' ' || c == '\t'))
    result_ = refusal(400, "A line of the header goes on with the one before.");
  if (done()) return;
  text_ += c;
  if (c == '\n') end_line();
}

void RequestReader::end_line() {
  const bool empty = text_.size() - line_ == 2;
  line_ = text_.size();
  if (empty) return finish();
  if (++lines_ > kMostHeaderFields + 1)
    result_ = refusal(431, concat("The header has more than ", kMostHeaderFields, " fields."));
}

void RequestReader::finish() {
  http::request_parser<http::empty_body> parser;
  parser.header_limit(kMostHeaderBytes);
  parser.body_limit(0);
  boost::beast::error_code error;
  parser.put(boost::asio::buffer(text_), error);
  const auto is = [&](http::error what) { return error == what; };
  if (is(http::error::bad_version))
    result_ = refusal(505, "HTTP/1.1 is spoken here.");
  else if (is(http::error::body_limit))
    result_ = refusal(413, "A request must have no body.");
  else if (error && error != http::error::need_more)
    result_ = refusal(400, concat("The request cannot be read: ", error.message(), "."));
  else if (!parser.is_header_done())
    result_ = refusal(400, "The request cannot be read.");
  else
    std::visit([this](auto&& found) { result_.emplace(std::move(found)); },
               request_of(parser.get()));
}

std::optional<std::string_view> query_value(std::string_view query, std::string_view name) {
  while (!query.empty()) {
    const std::string_view pair = query.substr(0, query.find('&'));
    query.remove_prefix(std::min(query.size(), pair.size() + 1));
    if (pair.size() > name.size() && pair.substr(0, name.size()) == name &&
        pair[name.size()] == '=')
      return pair.substr(name.size() + 1);
  }
  return std::nullopt;
}

}  // namespace moemamba
