# lmkan_shared_library(TARGET EXPORTS): the properties all libraries of the package share. Only the
# symbols of the version script EXPORTS are visible, everything must resolve at link time, and the C++
# runtime is linked in, so that a library loads next to any other copy of it.
function(lmkan_shared_library target exports)
  set(map ${CMAKE_CURRENT_SOURCE_DIR}/${exports})
  set_target_properties(${target} PROPERTIES LINK_DEPENDS ${map})
  if(NOT LMKAN_SANITIZE)
    target_link_options(${target} PRIVATE
      -Wl,--version-script=${map} -Wl,--no-undefined -static-libstdc++ -static-libgcc)
  endif()
  install(TARGETS ${target} LIBRARY DESTINATION lmkan_deploy/lib)
endfunction()
