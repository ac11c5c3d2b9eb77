# What the launcher carries in itself: the schema of its settings with all comments, how it was
# compiled, and the parts of its status page. As a script (-D from= to= header= function= -P): writes
# the bytes of files (with commas between them) as the C++ function that the header declares.
if(CMAKE_SCRIPT_MODE_FILE)
  string(REPLACE "," ";" from "${from}")
  set(bytes "")
  foreach(file ${from})
    file(READ ${file} more HEX)
    string(APPEND bytes ${more})
  endforeach()
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1,\n" bytes "${bytes}")
  file(WRITE ${to} "#include \"${header}\"\n\nnamespace moemamba {\n\n"
    "std::string_view ${function}() {\n"
    "static constexpr unsigned char kBytes[] = {\n${bytes}};\n"
    "return {reinterpret_cast<const char*>(kBytes), sizeof kBytes};\n}\n\n}\n")
  return()
endif()

set(generated ${CMAKE_BINARY_DIR}/generated/launcher)
function(moemamba_embed header function)  # and the files
  list(JOIN ARGN "," from)
  add_custom_command(
    OUTPUT ${generated}/${function}.cc
    COMMAND ${CMAKE_COMMAND} -D from=${from} -D to=${generated}/${function}.cc
            -D header=${header} -D function=${function} -P ${CMAKE_CURRENT_FUNCTION_LIST_FILE}
    DEPENDS ${ARGN} ${CMAKE_CURRENT_FUNCTION_LIST_FILE})
  target_sources(moemamba_launcher PRIVATE ${generated}/${function}.cc)
endfunction()

string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}}" moemamba_flags)
configure_file(launcher/build_facts.cc.in ${generated}/build_facts_generated.cc @ONLY)
target_sources(moemamba_launcher PRIVATE ${generated}/build_facts_generated.cc)
moemamba_embed(launcher/build_facts.h run_config_descriptors ${generated}/run_config.desc)
set(page ${CMAKE_SOURCE_DIR}/launcher/supervisor/page)
set(page_header launcher/supervisor/status_page.h)
moemamba_embed(${page_header} status_page_html ${page}/page.html)
moemamba_embed(${page_header} status_page_css ${page}/page.css)
moemamba_embed(${page_header} status_page_js ${page}/text.js ${page}/charts.js ${page}/heat.js
               ${page}/state.js ${page}/poll.js)
