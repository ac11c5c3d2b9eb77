#include "runtime/documents.h"

#include <zlib.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/file.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

bool is_input(const fs::path& path) {
  const auto kind = path.extension();
  return kind == ".txt" || kind == ".jsonl" || kind == ".rdb";
}

std::string name_of_row(const nlohmann::json& row) {
  for (const char* field : {"name", "title", "id"}) {
    const auto found = row.find(field);
    if (found == row.end()) continue;
    if (found->is_string()) return found->get<std::string>();
    if (found->is_number()) return found->dump();
  }
  return {};
}

void visit_jsonl(const MappedFile& file, const DocumentVisitor& visit) {
  const std::string_view all = file.text();
  int64_t number = 0;
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find('\n', begin), all.size());
    const std::string_view line = all.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto row = nlohmann::json::parse(line.begin(), line.end(), nullptr, false);
    check(row.is_object() && row.contains("text") && row["text"].is_string(), file.path(), ":",
          number, ": expected a JSON object with a \"text\", found ", line.substr(0, 60));
    std::string name = name_of_row(row);
    if (name.empty()) name = concat(fs::path(file.path()).filename().string(), ":", number);
    const auto& text = row["text"].get_ref<const std::string&>();
    if (!text.empty()) visit(name, text);
  }
}

// R's binary serialisation, as far as character vectors need it: big-endian 32-bit integers.
class RReader {
 public:
  RReader(std::string_view bytes, const std::string& path) : bytes_(bytes), path_(path) {}

  std::string_view take(int64_t count) {
    check(count >= 0 && size_t(count) <= bytes_.size() - at_, path_,
          ": an R value is cut off at byte ", at_);
    at_ += size_t(count);
    return bytes_.substr(at_ - size_t(count), size_t(count));
  }
  int32_t integer() {
    uint32_t value = 0;
    for (const char byte : take(4)) value = value << 8 | uint8_t(byte);
    return int32_t(value);
  }

  // The strings joined by newlines.
  std::string character_vector() {
    check(take(2) == "X\n", path_, ": expected R's binary format");
    const int32_t version = integer();
    check(version == 2 || version == 3, path_, ": expected R format 2 or 3, found ", version);
    take(8);                            // versions of R
    if (version == 3) take(integer());  // native encoding
    constexpr int32_t kStrings = 16, kString = 9;
    check((integer() & 255) == kStrings, path_, ": expected a character vector");
    std::string text;
    for (int32_t left = integer(); left > 0; --left) {
      check((integer() & 255) == kString, path_, ": expected a string at byte ", at_);
      const int32_t length = integer();
      if (length >= 0) text += take(length);  // -1 = NA
      text += '\n';
    }
    return text;
  }

 private:
  std::string_view bytes_;
  const std::string& path_;
  size_t at_ = 0;
};

// One record: u32 big-endian size, then a zlib stream. Moves `rest` past it.
std::string inflate_record(std::string_view& rest, const std::string& path) {
  RReader head(rest, path);
  const auto size = uint32_t(head.integer());
  rest.remove_prefix(4);
  check(size / 1100 <= rest.size(), path, ": a record of ", size, " bytes cannot come from ",
        rest.size(), " bytes");  // zlib shrinks to 1/1032 at best
  std::string out(size, '\0');
  z_stream stream{};
  check(inflateInit(&stream) == Z_OK, "zlib does not start");
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(rest.data()));
  stream.avail_in = uInt(std::min<size_t>(rest.size(), uInt(-1)));
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = size;
  const int status = inflate(&stream, Z_FINISH);
  const size_t used = stream.total_in, made = stream.total_out;
  inflateEnd(&stream);
  check(status == Z_STREAM_END && made == size, path,
        ": a compressed record is damaged or cut off");
  rest.remove_prefix(used);
  return out;
}

std::string first_line(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \n\r\t");
  if (begin == std::string::npos) return {};
  std::string line = text.substr(begin, text.find('\n', begin) - begin);
  line.resize(line.find_last_not_of(" \r\t") + 1);
  return line;
}

void visit_rdb(const MappedFile& file, const DocumentVisitor& visit) {
  std::string_view rest = file.text();
  while (!rest.empty()) {
    const std::string record = inflate_record(rest, file.path());
    const std::string text = RReader(record, file.path()).character_vector();
    if (!text.empty()) visit(first_line(text), text);
  }
}

}  // namespace

std::vector<std::string> list_inputs(const std::vector<std::string>& inputs) {
  std::vector<std::string> files;
  for (const std::string& input : inputs) {
    check(file_exists(input), input, ": no such file or folder");
    if (!fs::is_directory(input)) {
      check(is_input(input), input, ": expected .txt, .jsonl, .rdb or a folder of these");
      files.push_back(input);
      continue;
    }
    const size_t before = files.size();
    for (const auto& entry : fs::directory_iterator(input))
      if (entry.is_regular_file() && is_input(entry.path())) files.push_back(entry.path().string());
    check(files.size() > before, input, ": the folder holds no .txt, .jsonl or .rdb");
    std::sort(files.begin() + int64_t(before), files.end());
  }
  return files;
}

void visit_documents(const std::string& path, const DocumentVisitor& visit) {
  const MappedFile file(path);
  const auto kind = fs::path(path).extension();
  if (kind == ".jsonl") return visit_jsonl(file, visit);
  if (kind == ".rdb") return visit_rdb(file, visit);
  if (!file.text().empty()) visit(fs::path(path).stem().string(), file.text());
}

}  // namespace moemamba
