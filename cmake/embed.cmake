# What the launcher knows of its own build: the schema of its settings with all comments, and how
# it was compiled. As a script (-D from= to= -P): writes a file's bytes as a C++ function.
if(CMAKE_SCRIPT_MODE_FILE)
  file(READ ${from} bytes HEX)
  string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1,\n" bytes "${bytes}")
  file(WRITE ${to} "#include \"launcher/build_facts.h\"\n\nnamespace moemamba {\n\n"
    "std::string_view run_config_descriptors() {\n"
    "static constexpr unsigned char kBytes[] = {\n${bytes}};\n"
    "return {reinterpret_cast<const char*>(kBytes), sizeof kBytes};\n}\n\n}\n")
  return()
endif()

if(EXISTS ${CMAKE_SOURCE_DIR}/launcher/build_facts.cc.in)
  string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
  string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}}" moemamba_flags)
  set(generated ${CMAKE_BINARY_DIR}/generated/launcher)
  configure_file(launcher/build_facts.cc.in ${generated}/build_facts_generated.cc @ONLY)
  add_custom_command(
    OUTPUT ${generated}/run_config_descriptors.cc
    COMMAND ${CMAKE_COMMAND} -D from=${generated}/run_config.desc
            -D to=${generated}/run_config_descriptors.cc -P ${CMAKE_CURRENT_LIST_FILE}
    DEPENDS ${generated}/run_config.desc ${CMAKE_CURRENT_LIST_FILE})
  target_sources(moemamba_launcher PRIVATE ${generated}/build_facts_generated.cc
                 ${generated}/run_config_descriptors.cc)
endif()
