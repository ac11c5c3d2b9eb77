# MOEMAMBA_CUDA = AUTO takes nvcc where there is one, ON insists on it, OFF never looks for it.
# Afterwards: moemamba_cuda_state, one line for the summary. What is compiled for the device is
# collected in the target moemamba_cuda (nothing yet: the CPU is the only backend).
set(moemamba_cuda_state "off (MOEMAMBA_CUDA=OFF)")
if(NOT MOEMAMBA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MOEMAMBA_CUDA must be AUTO, ON or OFF, found '${MOEMAMBA_CUDA}'")
endif()

if(NOT MOEMAMBA_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)  # must be known before enable_language
  endif()
  if(NOT DEFINED ENV{CUDACXX} AND NOT DEFINED CMAKE_CUDA_COMPILER)
    find_program(moemamba_nvcc nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
    mark_as_advanced(moemamba_nvcc)
    if(moemamba_nvcc)
      set(CMAKE_CUDA_COMPILER ${moemamba_nvcc})
    endif()
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit 12.0 REQUIRED)
    # Not through CMAKE_CUDA_STANDARD: CMake 3.25 does not know CUDA20 and drops it silently.
    add_compile_options($<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
    list(JOIN CMAKE_CUDA_ARCHITECTURES ", sm_" architectures)
    string(REPLACE "-real" "" architectures "${architectures}")
    set(moemamba_cuda_state "${CMAKE_CUDA_COMPILER_VERSION} (sm_${architectures}), no kernels yet")
  elseif(MOEMAMBA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MOEMAMBA_CUDA=ON, but no nvcc was found in PATH, CUDA_HOME or "
            "/usr/local/cuda. Set CUDACXX=/path/to/nvcc, or use the preset cpu-release.")
  else()
    set(moemamba_cuda_state "off (no nvcc found)")
  endif()
endif()
add_custom_target(moemamba_cuda)
