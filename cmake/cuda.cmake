# Enables CUDA where it is wanted and there; sets EXAFUSE_HAS_CUDA; defines exafuse_cuda_target.

set(EXAFUSE_HAS_CUDA OFF)
if(EXAFUSE_CUDA STREQUAL "OFF")
  message(STATUS "exafuse: no kernels (EXAFUSE_CUDA=OFF)")
else()
  # 90a has no successor, so PTX for plain 90 goes along for every later GPU.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real;90-virtual")
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

  # nvcc of the registry's wheels looks for its libraries in lib64; theirs is called lib.
  if(CMAKE_CUDA_COMPILER)
    get_filename_component(toolkit "${CMAKE_CUDA_COMPILER}" DIRECTORY)
    get_filename_component(toolkit "${toolkit}" DIRECTORY)
    if(EXISTS "${toolkit}/lib/libcudart_static.a")
      set(EXAFUSE_CUDART_FOLDER "${toolkit}/lib")
      set(ENV{LIBRARY_PATH} "${toolkit}/lib:$ENV{LIBRARY_PATH}")
    endif()
  endif()

  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(EXAFUSE_HAS_CUDA ON)
    message(STATUS "exafuse: kernels for ${CMAKE_CUDA_ARCHITECTURES}, ${CMAKE_CUDA_COMPILER}")
  elseif(EXAFUSE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "EXAFUSE_CUDA=ON, but CMake found no nvcc: set CUDACXX or EXAFUSE_NVCC")
  else()
    message(STATUS "exafuse: no kernels (no nvcc found)")
  endif()
endif()

# One compiler process wants up to 4 GB: no more at a time than cores or memory allow.
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
cmake_host_system_information(RESULT memory_mb QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR cuda_jobs "${memory_mb} / 4096")
if(cuda_jobs GREATER cores)
  set(cuda_jobs ${cores})
elseif(cuda_jobs LESS 1)
  set(cuda_jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS cuda=${cuda_jobs})

# What every target with kernels has in common.
function(exafuse_cuda_target target)
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_include_directories(
    ${target} SYSTEM PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}>")
  set(warnings -Wall -Wextra)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND warnings -Wno-restrict)  # GCC 12 gives it for any std::string "a" + b
  endif()
  list(JOIN warnings "," host_warnings)
  target_compile_options(
    ${target}
    PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-Xcompiler=${host_warnings}>"
            "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills>"
            "$<$<COMPILE_LANGUAGE:CXX>:${warnings}>")
  set_target_properties(
    ${target}
    PROPERTIES CXX_VISIBILITY_PRESET hidden
               CUDA_VISIBILITY_PRESET hidden
               VISIBILITY_INLINES_HIDDEN ON
               JOB_POOL_COMPILE cuda)
  # The static CUDA runtime stays private: another one may live in the same process.
  target_link_options(${target} PRIVATE "LINKER:--exclude-libs,ALL")
  if(EXAFUSE_CUDART_FOLDER)
    target_link_directories(${target} PRIVATE "${EXAFUSE_CUDART_FOLDER}")
  endif()
endfunction()
