// What the stand-ins for driver and runtime share.
#pragma once

// The device whose context is current in this thread.
int current_device();
// How many each of the two devices has: an H100 has 132. Persistent kernels launch as many blocks.
int multiprocessors();
void set_multiprocessors(int count);
