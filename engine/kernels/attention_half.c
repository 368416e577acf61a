#include "attention.h"

#define T _Float16
#define LOAD load_half
#define LIMIT 65504
#define NAMED(x) x##_half
#include "attend.h"
