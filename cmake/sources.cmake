# A digest of all that the program is compiled from, so that ranks of other sources do not meet.
# As a script (-D root= files= to= -P): hashes the files that `files` lists, as
#   sha256sum FILE... | sha256sum
# would in the rooms' folder, and writes the first 16 digits as a C++ function.
if(CMAKE_SCRIPT_MODE_FILE)
  file(STRINGS ${files} names)
  set(lines "")
  foreach(name ${names})
    file(SHA256 ${root}/${name} digest)
    string(APPEND lines "${digest}  ${name}\n")
  endforeach()
  string(SHA256 digest "${lines}")
  string(SUBSTRING ${digest} 0 16 digest)
  file(WRITE ${to} "#include \"launcher/build_facts.h\"\n\nnamespace moemamba {\n\n"
    "std::string_view build_sources() { return \"${digest}\"; }\n\n}\n")
  return()
endif()

set(patterns "")
foreach(room core kernels parallel model runtime launcher)
  foreach(kind h cc proto cu cuh inc in)
    list(APPEND patterns ${room}/*.${kind})
  endforeach()
endforeach()
file(GLOB_RECURSE sources RELATIVE ${CMAKE_SOURCE_DIR} CONFIGURE_DEPENDS ${patterns})
list(SORT sources)
list(JOIN sources "\n" names)
set(generated ${CMAKE_BINARY_DIR}/generated/launcher)
file(CONFIGURE OUTPUT ${generated}/sources.txt CONTENT "${names}\n" @ONLY)  # as it is: left alone
list(TRANSFORM sources PREPEND ${CMAKE_SOURCE_DIR}/)
add_custom_command(
  OUTPUT ${generated}/build_sources.cc
  COMMAND ${CMAKE_COMMAND} -D root=${CMAKE_SOURCE_DIR} -D files=${generated}/sources.txt
          -D to=${generated}/build_sources.cc -P ${CMAKE_CURRENT_LIST_FILE}
  DEPENDS ${sources} ${generated}/sources.txt ${CMAKE_CURRENT_LIST_FILE})
target_sources(moemamba_launcher PRIVATE ${generated}/build_sources.cc)
