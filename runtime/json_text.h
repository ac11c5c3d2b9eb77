#pragma once
#include <string>
#include <string_view>

namespace moemamba {

// `text` as a JSON string, quotes included. Bytes that are no UTF-8 become U+FFFD, so that what is
// read back is always JSON.
std::string json_text(std::string_view text);
// A number as JSON has it; what is not finite becomes null.
std::string json_number(double value);

}  // namespace moemamba
