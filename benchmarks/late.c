/* Lets every message of MLX's ring leave late: a slower network, for benchmarks/messages.py.

   cc -shared -fPIC -O2 -o late.so late.c -ldl
   LD_PRELOAD=late.so ...

   message_delay_ns is set by the program while it runs. A thread that waits for a message spins in
   recv; where there are as many processes as cores it would keep the others from computing, so it
   lets them go first. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

volatile long message_delay_ns = 0;

ssize_t send(int socket, const void *data, size_t size, int flags) {
  static ssize_t (*next)(int, const void *, size_t, int);
  static __thread int is_precise;
  if (!next) next = (ssize_t(*)(int, const void *, size_t, int))dlsym(RTLD_NEXT, "send");
  if (message_delay_ns > 0) {
    struct timespec delay = {message_delay_ns / 1000000000, message_delay_ns % 1000000000};
    if (!is_precise) is_precise = prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0) == 0; /* not 50 us late */
    nanosleep(&delay, 0);
  }
  return next(socket, data, size, flags);
}

ssize_t recv(int socket, void *data, size_t size, int flags) {
  static ssize_t (*next)(int, void *, size_t, int);
  if (!next) next = (ssize_t(*)(int, void *, size_t, int))dlsym(RTLD_NEXT, "recv");
  ssize_t found = next(socket, data, size, flags);
  if (found < 0 && errno == EAGAIN) {
    sched_yield();
    errno = EAGAIN;
  }
  return found;
}
