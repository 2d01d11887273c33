// What the stand-ins share: a log of what was asked of them, and which memory is the device's.
#ifndef EMULATION_LOG_H
#define EMULATION_LOG_H
#include <stddef.h>

// One line, while the log is on.
void emulation_log(const char *format, ...);
// Whether an address, or all of a range, lies in memory of the device.
int emulation_on_device(const void *address);
int emulation_holds(const void *address, size_t bytes);

#endif
