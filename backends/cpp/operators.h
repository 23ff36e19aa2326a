// The operators of a decoding step, for one CPU: what the generated step.cpp calls.
//
// Weights keep the element type in which they are stored and are widened to float32 in registers;
// everything else is float32. Every number of a row is computed by the same operations in the same
// order, independent of other rows and of the thread that computes it: products sum over their
// inner dimension in LANES partial sums, from the first number to the last, and join those in one
// order; sums over keys run from the first key to the last.
#pragma once

#include "attention.h"
#include "experts.h"
#include "products.h"
#include "rowwise.h"
