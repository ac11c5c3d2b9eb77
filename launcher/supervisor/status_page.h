#pragma once
#include <memory>
#include <string>
#include <string_view>

namespace moemamba {

// The page that shows a run: one document without any outside resource. Its style and script are
// named by their digests in the policy that goes with it, so that nothing else runs in it.
struct StatusPage {
  std::shared_ptr<const std::string> html;
  std::string fields;  // of the header
};
StatusPage make_status_page();

// Its parts, in launcher/supervisor/page/ (embed.cmake).
std::string_view status_page_html();
std::string_view status_page_css();
std::string_view status_page_js();

}  // namespace moemamba
