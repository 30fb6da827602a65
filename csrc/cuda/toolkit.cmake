# Finds nvcc: CUDACXX, the PATH, /usr/local/cuda, or the packages nvidia-cuda-nvcc, -crt, -runtime,
# -cccl and nvidia-nvvm of the Python that builds, which also come before one older than CUDA 13.
set(VT_CUDA_PYTHON_ROOT "")
execute_process(
  COMMAND
    ${Python_EXECUTABLE} -c
    "import pathlib, nvidia; print(next((str(p / 'cu13') for p in map(pathlib.Path, nvidia.__path__) if (p / 'cu13/bin/nvcc').exists()), ''))"
  OUTPUT_VARIABLE VT_CUDA_PYTHON_ROOT
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET
)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(VT_NVCC nvcc PATHS /usr/local/cuda/bin)
  if(VT_NVCC AND VT_CUDA_PYTHON_ROOT)
    execute_process(COMMAND ${VT_NVCC} --version OUTPUT_VARIABLE VT_NVCC_VERSION ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+)" VT_NVCC_RELEASE "${VT_NVCC_VERSION}")
    if(CMAKE_MATCH_1 LESS 13)
      set(VT_NVCC "")
    endif()
  endif()
  if(VT_NVCC)
    set(CMAKE_CUDA_COMPILER ${VT_NVCC})
  elseif(VT_CUDA_PYTHON_ROOT)
    set(CMAKE_CUDA_COMPILER ${VT_CUDA_PYTHON_ROOT}/bin/nvcc)
  else()
    message(
      FATAL_ERROR
      "VT_CUDA=ON needs nvcc 13. Install a CUDA toolkit, or its compiler from PyPI: pip install \
nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm"
    )
  endif()
endif()

# The packages have lib where nvcc looks for lib64.
set(VT_CUDA_LIB_DIR "")
if(CMAKE_CUDA_COMPILER)
  get_filename_component(VT_CUDA_ROOT ${CMAKE_CUDA_COMPILER} DIRECTORY)
  get_filename_component(VT_CUDA_ROOT ${VT_CUDA_ROOT} DIRECTORY)
  if(EXISTS ${VT_CUDA_ROOT}/lib/libcudart_static.a AND NOT EXISTS ${VT_CUDA_ROOT}/lib64)
    set(VT_CUDA_LIB_DIR ${VT_CUDA_ROOT}/lib)
    set(ENV{LIBRARY_PATH} "${VT_CUDA_LIB_DIR}:$ENV{LIBRARY_PATH}") # for the test of the compiler
  endif()
endif()
