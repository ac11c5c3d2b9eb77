#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "core/tensor.h"
#include "runtime/manifest.pb.h"
#include "runtime/wire_fields.h"

namespace moemamba {

constexpr int kManifestFormat = 1;  // read: this one and the one before; written: this one

// A manifest that holds, but of a format that this program does not read: that is no damage.
struct OtherFormat : Error {
  using Error::Error;
};

// A name that stays in its folder: letters, digits, '.', '_' and '-', not beginning with a dot; at
// most 128 of them.
bool is_plain_name(std::string_view name);

// What unseal() found: the bytes of MANIFEST.pb, from which files, tensors and pieces are read when
// they are asked for. protobuf's objects would be many times as large as the bytes that stand for
// the smallest of them. Views of a Manifest live as long as it does.
class Manifest {
 public:
  using Piece = CheckpointManifest::Piece;

  class File {
   public:
    explicit File(std::string_view wire) : wire_(wire) {}
    std::string name() const { return std::string(name_view()); }
    std::string_view name_view() const;
    int64_t bytes() const;
    std::string_view sha256() const;

   private:
    std::string_view wire_;
  };

  // Pieces of one kind, in their order; made one after the other.
  class Pieces {
   public:
    Pieces(std::string_view tensor, int field) : fields_(tensor, field) {}
    class Iterator {
     public:
      explicit Iterator(WireFields::Iterator at) : at_(at) {}
      Piece operator*() const;
      Iterator& operator++() { return ++at_, *this; }
      bool operator!=(const Iterator& other) const { return at_ != other.at_; }

     private:
      WireFields::Iterator at_;
    };
    Iterator begin() const { return Iterator(fields_.begin()); }
    Iterator end() const { return Iterator(fields_.end()); }
    bool empty() const { return !(begin() != end()); }

   private:
    WireFields fields_;
  };

  class Tensor {
   public:
    explicit Tensor(std::string_view wire) : wire_(wire) {}
    std::string name() const { return std::string(name_view()); }
    std::string_view name_view() const;
    Shape shape() const;
    Pieces value() const;
    Pieces exp_avg() const;
    Pieces exp_avg_sq() const;
    std::string_view wire() const { return wire_; }  // a CheckpointManifest.Tensor

   private:
    std::string_view wire_;
  };

  // Numbered things, made when they are looked at.
  template <class Thing>
  class List {
   public:
    List(const std::string& bytes, const std::vector<uint32_t>& places)
        : bytes_(bytes), places_(places) {}
    class Iterator {
     public:
      Iterator(const List& list, size_t at) : list_(list), at_(at) {}
      Thing operator*() const { return list_[at_]; }
      Iterator& operator++() { return ++at_, *this; }
      bool operator!=(const Iterator& other) const { return at_ != other.at_; }

     private:
      List list_;
      size_t at_;
    };
    size_t size() const { return places_.size(); }
    Thing operator[](size_t i) const { return Thing(field_at(bytes_, places_[i]).text); }
    Iterator begin() const { return {*this, 0}; }
    Iterator end() const { return {*this, size()}; }

   private:
    const std::string& bytes_;
    const std::vector<uint32_t>& places_;
  };

  // Everything but files and tensors.
  const CheckpointManifest& facts() const { return facts_; }
  List<File> files() const { return {bytes_, files_}; }
  int files_size() const { return int(files_.size()); }
  File files(int i) const { return files()[size_t(i)]; }
  List<Tensor> tensors() const { return {bytes_, tensors_}; }
  int tensors_size() const { return int(tensors_.size()); }
  Tensor tensors(int i) const { return tensors()[size_t(i)]; }
  std::optional<Tensor> find(std::string_view tensor) const;  // by name

 private:
  friend Manifest unseal(std::string bytes, const std::string& path);
  void read(std::string_view manifest, const std::string& path);

  std::string bytes_;
  CheckpointManifest facts_;
  std::vector<uint32_t> files_, tensors_;  // where the field of each begins
};

// The bytes of MANIFEST.pb: the manifest and its digest.
std::string seal(const CheckpointManifest& manifest);

// The manifest of sealed bytes. Throws an Error, naming `path`, unless the digest holds, every bit
// of the file counts, the format is one that this program reads (else OtherFormat), fields stand in
// the order of their numbers, names are plain, pieces lie inside their files and cover every tensor
// exactly, and nothing asks for more than the files hold. With the bytes given, it never takes
// more memory than twice their number, 16 KiB aside.
Manifest unseal(std::string bytes, const std::string& path);

}  // namespace moemamba
