# Sets TENSORRT_INCLUDE_DIR to the folder of TensorRT's C++ headers. Order: the value the user gave (CMake
# variable, then environment), the system's, the pinned download into the user's cache.
if(NOT TENSORRT_INCLUDE_DIR AND DEFINED ENV{TENSORRT_INCLUDE_DIR})
  set(TENSORRT_INCLUDE_DIR $ENV{TENSORRT_INCLUDE_DIR})
endif()
if(TENSORRT_INCLUDE_DIR AND NOT EXISTS ${TENSORRT_INCLUDE_DIR}/NvInferRuntime.h)
  message(FATAL_ERROR "TENSORRT_INCLUDE_DIR: expected a folder with NvInferRuntime.h, found ${TENSORRT_INCLUDE_DIR}")
endif()
if(NOT TENSORRT_INCLUDE_DIR)
  find_path(TENSORRT_SYSTEM_INCLUDE_DIR NvInferRuntime.h)
  if(TENSORRT_SYSTEM_INCLUDE_DIR)
    set(TENSORRT_INCLUDE_DIR ${TENSORRT_SYSTEM_INCLUDE_DIR})
  else()
    find_package(Python3 COMPONENTS Interpreter REQUIRED)
    execute_process(
      COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/fetch_headers.py tensorrt
      OUTPUT_VARIABLE TENSORRT_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR
        "No headers of TensorRT. Set TENSORRT_INCLUDE_DIR to a folder with NvInferRuntime.h, or install pip for ${Python3_EXECUTABLE}.")
    endif()
  endif()
endif()
message(STATUS "TensorRT headers: ${TENSORRT_INCLUDE_DIR}")
