# One source, compiled once per instruction set, chosen at run time: kernels/cpu/simd/*.cc is
# built as avx2 and as avx512 (namespace MOEMAMBA_SIMD). Such files include no inline headers, so
# that no function compiled for a newer processor can be picked by the linker for all.
file(GLOB simd_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/cpu/simd/*.cc)
foreach(level avx2 avx512)
  if(simd_sources)
    add_library(moemamba_simd_${level} OBJECT ${simd_sources})
    target_include_directories(moemamba_simd_${level} PRIVATE ${CMAKE_SOURCE_DIR})
    target_compile_definitions(moemamba_simd_${level} PRIVATE MOEMAMBA_SIMD=${level})
    target_sources(moemamba_kernels PRIVATE $<TARGET_OBJECTS:moemamba_simd_${level}>)
  endif()
endforeach()
if(simd_sources)
  target_compile_options(moemamba_simd_avx2 PRIVATE -mavx2 -mfma)
  target_compile_options(moemamba_simd_avx512 PRIVATE
    -mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512
    -Wno-uninitialized -Wno-maybe-uninitialized)  # false, in the headers of gcc 12 (its bug 105593)
  # The room's own glob must not compile them a third time.
  get_target_property(sources moemamba_kernels SOURCES)
  list(REMOVE_ITEM sources ${simd_sources})
  set_target_properties(moemamba_kernels PROPERTIES SOURCES "${sources}")
endif()
