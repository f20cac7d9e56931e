# What build_info() of the extension reports, as definitions of csrc/bindings.cpp alone, so that
# a new hash recompiles no kernel: the strings EXAFUSE_VERSION, EXAFUSE_SOURCE_HASH,
# EXAFUSE_KERNEL_HASHES ("name=hash,name=hash"), EXAFUSE_CUDA_ARCHS,
# EXAFUSE_CUDA_COMPILER and the module's name EXAFUSE_MODULE (no string).

# SHA-256 over "<path> <SHA-256 of the file>\n" of every file of csrc, sorted by path.
function(exafuse_source_hash result)
  file(
    GLOB_RECURSE files CONFIGURE_DEPENDS
    RELATIVE "${PROJECT_SOURCE_DIR}/csrc"
    "${PROJECT_SOURCE_DIR}/csrc/*.h" "${PROJECT_SOURCE_DIR}/csrc/*.cuh"
    "${PROJECT_SOURCE_DIR}/csrc/*.cpp" "${PROJECT_SOURCE_DIR}/csrc/*.cu")
  list(SORT files)
  set(listing "")
  foreach(file IN LISTS files)
    file(SHA256 "${PROJECT_SOURCE_DIR}/csrc/${file}" hash)
    string(APPEND listing "${file} ${hash}\n")
    # An edit runs this again before the build, so the hash is never that of older sources.
    set_property(
      DIRECTORY "${PROJECT_SOURCE_DIR}" APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
                                                        "${PROJECT_SOURCE_DIR}/csrc/${file}")
  endforeach()
  string(SHA256 hash "${listing}")
  set(${result} "${hash}" PARENT_SCOPE)
endfunction()

function(exafuse_build_info target)
  exafuse_source_hash(source_hash)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/cmake/kernel_hash.py"
    OUTPUT_VARIABLE kernel_hashes
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(JOIN CMAKE_CUDA_ARCHITECTURES "," archs)
  set_property(
    SOURCE "${PROJECT_SOURCE_DIR}/csrc/bindings.cpp"
    TARGET_DIRECTORY ${target}
    APPEND
    PROPERTY COMPILE_DEFINITIONS
             EXAFUSE_MODULE=${target}
             EXAFUSE_VERSION="${PROJECT_VERSION}"
             EXAFUSE_SOURCE_HASH="${source_hash}"
             EXAFUSE_KERNEL_HASHES="${kernel_hashes}"
             EXAFUSE_CUDA_ARCHS="${archs}"
             EXAFUSE_CUDA_COMPILER="nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
endfunction()
