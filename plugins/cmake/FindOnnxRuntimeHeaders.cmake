# Sets ORT_INCLUDE_DIR to the folder of ONNX Runtime's C headers. Order: the value the user gave (CMake
# variable, then environment), the system's, the pinned download into the user's cache.
if(NOT ORT_INCLUDE_DIR AND DEFINED ENV{ORT_INCLUDE_DIR})
  set(ORT_INCLUDE_DIR $ENV{ORT_INCLUDE_DIR})
endif()
if(ORT_INCLUDE_DIR AND NOT EXISTS ${ORT_INCLUDE_DIR}/onnxruntime_c_api.h)
  message(FATAL_ERROR "ORT_INCLUDE_DIR: expected a folder with onnxruntime_c_api.h, found ${ORT_INCLUDE_DIR}")
endif()
if(NOT ORT_INCLUDE_DIR)
  find_path(ORT_SYSTEM_INCLUDE_DIR onnxruntime_c_api.h
    PATH_SUFFIXES onnxruntime onnxruntime/core/session)
  if(ORT_SYSTEM_INCLUDE_DIR)
    set(ORT_INCLUDE_DIR ${ORT_SYSTEM_INCLUDE_DIR})
  else()
    find_package(Python3 COMPONENTS Interpreter REQUIRED)
    execute_process(
      COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/fetch_headers.py onnxruntime
      OUTPUT_VARIABLE ORT_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR
        "No headers of ONNX Runtime. Set ORT_INCLUDE_DIR to a folder with onnxruntime_c_api.h, or install npm.")
    endif()
  endif()
endif()
message(STATUS "ONNX Runtime headers: ${ORT_INCLUDE_DIR}")
