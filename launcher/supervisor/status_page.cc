#include "launcher/supervisor/status_page.h"

#include "core/error.h"
#include "core/file.h"

namespace moemamba {

namespace {

std::string bytes_of_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes += char(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string base64(std::string_view bytes) {
  static constexpr char kDigits[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t three = 0;
    for (size_t k = 0; k < 3; ++k)
      three = three << 8 | (i + k < bytes.size() ? uint8_t(bytes[i + k]) : 0);
    for (size_t k = 0; k < 4; ++k)
      text += i + k <= bytes.size() ? kDigits[three >> (18 - 6 * k) & 63] : '=';
  }
  return text;
}

std::string digest_of(std::string_view text) {
  return "'sha256-" + base64(bytes_of_hex(sha256(text))) + "'";
}

// `text` in the place of `mark`.
void put(std::string& page, std::string_view mark, std::string_view text) {
  const size_t at = page.find(mark);
  check(at != std::string::npos, "the status page has no ", mark);
  page.replace(at, mark.size(), text);
}

}  // namespace

StatusPage make_status_page() {
  std::string page(status_page_html());
  put(page, "{{css}}", status_page_css());
  put(page, "{{js}}", status_page_js());
  return {
      .html = std::make_shared<const std::string>(std::move(page)),
      .fields = concat("Content-Security-Policy: default-src 'none'; style-src ",
                       digest_of(status_page_css()), "; script-src ", digest_of(status_page_js()),
                       "; connect-src 'self'; img-src data:; base-uri 'none'; form-action "
                       "'none'; frame-ancestors 'none'\r\n")};
}

}  // namespace moemamba
