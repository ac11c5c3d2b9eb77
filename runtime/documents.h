#pragma once
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace moemamba {

// Receives a document's name and text; both live until it returns.
using DocumentVisitor = std::function<void(const std::string& name, std::string_view text)>;

// All inputs as files, folders replaced by the .txt, .jsonl and .rdb in them, sorted by name.
// Missing, of another kind, or nothing found: Error.
std::vector<std::string> list_inputs(const std::vector<std::string>& inputs);

// Every document of one file, in order; documents without text are left out.
// .txt    one document, named as the file
// .jsonl  {"text": ...} a line, named by its "name", "title" or "id", else FILE:LINE
// .rdb    R's data base of character vectors (one zlib stream each); lines joined by newlines,
//         named by the first line that is not empty
void visit_documents(const std::string& path, const DocumentVisitor& visit);

}  // namespace moemamba
