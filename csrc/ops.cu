// The loops of ops.cpp, for CUDA: to come.
