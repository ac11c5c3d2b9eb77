# MOEMAMBA_CUDA = AUTO takes nvcc where there is one, ON insists on it, OFF never looks for it.
# Afterwards: MOEMAMBA_HAS_CUDA, and moemamba_cuda_state, one line for the summary. What the device
# runs is in the rooms' libraries (kernels/cuda, parallel/cuda, core/device_cuda.cc).
set(MOEMAMBA_HAS_CUDA OFF)
set(moemamba_cuda_state "off (MOEMAMBA_CUDA=OFF)")
if(NOT MOEMAMBA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MOEMAMBA_CUDA must be AUTO, ON or OFF, found '${MOEMAMBA_CUDA}'")
endif()

if(NOT MOEMAMBA_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    # Must be known before enable_language. 90a leaves its PTX in the libraries, for cuda_code_test.
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a)
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
    find_package(CUDAToolkit 12.5 REQUIRED)  # cudaGetDriverEntryPointByVersion
    # CUDA sources follow CMAKE_CXX_STANDARD, whose flag for nvcc CMake 3.25 does not know.
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    list(JOIN CMAKE_CUDA_ARCHITECTURES ", sm_" architectures)
    string(REPLACE "-real" "" architectures "${architectures}")
    set(moemamba_cuda_state "${CMAKE_CUDA_COMPILER_VERSION} (sm_${architectures})")
    set(MOEMAMBA_HAS_CUDA ON)
    # -fmad stays on: the device's results are held to tolerances, and are the same on every run.
    # --no-compress: the PTX is text there. ptxas warns where a kernel spills registers.
    add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-Xcompiler=-Wall>"
                        "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;-diag-suppress=20012;--no-compress>"
                        "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills>")
    # The field's libraries without their .so links (wheel-like toolkits) are found by version.
    find_path(NCCL_INCLUDE_DIR nccl.h HINTS ENV NCCL_ROOT ${CUDAToolkit_INCLUDE_DIRS}
              PATH_SUFFIXES include)
    find_library(NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS ENV NCCL_ROOT ${CUDAToolkit_LIBRARY_DIR}
                 PATH_SUFFIXES lib lib64)
    mark_as_advanced(NCCL_INCLUDE_DIR NCCL_LIBRARY)
    if(NCCL_INCLUDE_DIR AND NCCL_LIBRARY)
      add_library(NCCL::NCCL UNKNOWN IMPORTED)
      set_target_properties(NCCL::NCCL PROPERTIES IMPORTED_LOCATION ${NCCL_LIBRARY}
                            INTERFACE_INCLUDE_DIRECTORIES ${NCCL_INCLUDE_DIR})
      string(APPEND moemamba_cuda_state ", NCCL")
    else()
      string(APPEND moemamba_cuda_state ", no NCCL: one rank only")
    endif()
  elseif(MOEMAMBA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MOEMAMBA_CUDA=ON, but no nvcc was found in PATH, CUDA_HOME or "
            "/usr/local/cuda. Set CUDACXX=/path/to/nvcc, or use the preset cpu-release.")
  else()
    set(moemamba_cuda_state "off (no nvcc found)")
  endif()
endif()
