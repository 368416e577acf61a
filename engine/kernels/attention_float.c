#include <float.h>

#include "attention.h"

#define T float
#define LOAD load_float
#define LIMIT FLT_MAX
#define NAMED(x) x##_float
#include "attend.h"
