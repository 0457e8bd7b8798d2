// Every CUDA kernel as host C++.
#include "radius_graph.cu"
