# The last words of a configuration: what this build is made of.
execute_process(COMMAND ${MPIEXEC_EXECUTABLE} --version OUTPUT_VARIABLE mpi_words
                ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REGEX MATCH "[^\n]*" mpi_words "${mpi_words}")
string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
message(STATUS "moemamba ${PROJECT_VERSION}")
message(STATUS "  compiler  ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}, "
        "${CMAKE_CXX_FLAGS_${build_type}}")
message(STATUS "  BLAS      OpenBLAS ${openblas_VERSION}")
message(STATUS "  MPI       ${mpi_words} (standard ${MPI_C_VERSION})")
message(STATUS "  CUDA      ${moemamba_cuda_state}")
message(STATUS "  tests     ${MOEMAMBA_TESTS}")
message(STATUS "")
