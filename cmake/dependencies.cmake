# Everything that is linked from outside, found once. Debian 12 names; Conda and Spack work too.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(Boost 1.74 REQUIRED)  # headers alone: Asio and Beast
find_package(ZLIB REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_package(MPI 3.1 REQUIRED COMPONENTS C)
set(Protobuf_USE_STATIC_LIBS ON)  # why: CMakeLists.txt
find_package(Protobuf CONFIG QUIET)
if(NOT Protobuf_FOUND)
  find_package(Protobuf 3.21 REQUIRED)  # Debian ships no CMake files of its own
endif()
if(NOT Protobuf_PROTOC_EXECUTABLE)
  get_target_property(Protobuf_PROTOC_EXECUTABLE protobuf::protoc LOCATION)
endif()
pkg_check_modules(openblas REQUIRED IMPORTED_TARGET openblas)
pkg_check_modules(sentencepiece REQUIRED IMPORTED_TARGET sentencepiece)
pkg_check_modules(hwloc REQUIRED IMPORTED_TARGET hwloc)
# The C++ bindings of MPI are gone from the standard; without this, mpi.h asks for their library.
add_compile_definitions(OMPI_SKIP_MPICXX=1 MPICH_SKIP_MPICXX=1)
