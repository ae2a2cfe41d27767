//! Missing waits show in the numbers of the emulated device.
