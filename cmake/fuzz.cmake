# libFuzzer targets (preset cpu-fuzz, clang): each *_fuzz.cc of tests/fuzz is a program. They link
# only what reads files of others, so that little is built under the sanitizers.
add_library(fuzzed STATIC
  runtime/safetensors.cc runtime/json_reader.cc runtime/manifest.cc runtime/token_files.cc
  runtime/weights_files.cc runtime/checkpoint_folder.cc runtime/control_wire.cc
  runtime/json_text.cc runtime/line_tail.cc runtime/curves.cc runtime/run_records.cc
  launcher/supervisor/status_http.cc launcher/supervisor/status_answers.cc
  launcher/supervisor/status_facts.cc launcher/supervisor/status_json.cc
  launcher/supervisor/status_metrics.cc launcher/supervisor/status_page.cc
  model/config.cc model/pattern.cc)
foreach(part html css js)
  target_sources(fuzzed PRIVATE ${CMAKE_BINARY_DIR}/generated/launcher/status_page_${part}.cc)
endforeach()
foreach(proto model/model_config parallel/parallel_config runtime/train_config runtime/manifest
        runtime/control launcher/launch_config launcher/run_config)
  target_sources(fuzzed PRIVATE ${CMAKE_BINARY_DIR}/generated/${proto}.pb.cc)
endforeach()
target_include_directories(fuzzed PUBLIC ${CMAKE_SOURCE_DIR})
target_include_directories(fuzzed SYSTEM PUBLIC ${CMAKE_BINARY_DIR}/generated)
target_link_libraries(fuzzed PUBLIC moemamba_core nlohmann_json::nlohmann_json Boost::headers)

add_custom_target(fuzz)
file(GLOB fuzz_sources CONFIGURE_DEPENDS tests/fuzz/*_fuzz.cc)
foreach(source ${fuzz_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE fuzzed)
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  add_dependencies(fuzz ${name})
endforeach()
