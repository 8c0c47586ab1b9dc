/* SPDX-License-Identifier: MIT */
/*
 * I/O that keeps pages in use for as long as a test wants: each way has a command that begins it,
 * returns while the kernel holds the pages, and one that ends it.
 */
#include "actor.h"

#include <fcntl.h>
#include <linux/errqueue.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>

static int pipe_ends[2] = { -1, -1 };

/* vmsplice ADDRESS PAGES: lend the pages to a pipe */
static void do_vmsplice(const struct command *command)
{
	struct iovec range = { pointer(command, 1), bytes(command, 2) };

	if (pipe_ends[0] < 0 && pipe(pipe_ends))
		return failed("pipe");
	done_or_failed(vmsplice(pipe_ends[1], &range, 1, 0), "vmsplice");
}

/* drain PAGES SEED: read them out of the pipe; answers whether they have that content */
static void do_drain(const struct command *command)
{
	static char page[PAGE_BYTES];
	uint64_t pages = number(command, 1), seed = number(command, 2), good = 0;

	for (uint64_t n = 0; n < pages; n++) {
		for (size_t at = 0; at < PAGE_BYTES;) {
			ssize_t got = read(pipe_ends[0], page + at, PAGE_BYTES - at);

			if (got <= 0)
				return failed("read");
			at += got;
		}
		for (uint64_t word = 0; word < PAGE_WORDS; word++)
			good += ((uint64_t *)page)[word] == content_word(seed, n, word);
	}
	answer("ok %d", good == pages * PAGE_WORDS);
}

static int ring = -1;

/* register ADDRESS PAGES: fixed buffers of io_uring, which are pinned for long */
static void do_register(const struct command *command)
{
	struct iovec range = { pointer(command, 1), bytes(command, 2) };
	struct io_uring_params parameters = { 0 };

	if (ring < 0)
		ring = syscall(SYS_io_uring_setup, 4, &parameters);
	if (ring < 0)
		return failed("io_uring_setup");
	done_or_failed(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &range, 1),
		       "io_uring_register");
}

/* unregister */
static void do_unregister(const struct command *command)
{
	(void)command;
	done_or_failed(syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0),
		       "io_uring_register");
}

static int tcp[2] = { -1, -1 };
static size_t queued_bytes;

/* A TCP connection to ourselves: tcp[0] sends, tcp[1] receives. */
static int connect_tcp(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr = { htonl(0x7f000001) } };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1, small = 4096;

	tcp[0] = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
	if (setsockopt(tcp[0], SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one)) ||
	    bind(listener, (void *)&address, sizeof(address)) || listen(listener, 1) ||
	    getsockname(listener, (void *)&address, &length) ||
	    connect(tcp[0], (void *)&address, sizeof(address)))
		return -1;
	tcp[1] = accept(listener, NULL, NULL);
	return close(listener);
}

/*
 * zerocopy ADDRESS PAGES: send the pages themselves with MSG_ZEROCOPY. Nobody reads and the
 * receiver's window is full before, so they wait in the send queue.
 */
static void do_zerocopy(const struct command *command)
{
	static const char padding[65536];
	int large = 64 << 20;
	ssize_t sent;

	if (tcp[0] < 0 && connect_tcp())
		return failed("connect");
	queued_bytes = 0;
	while ((sent = send(tcp[0], padding, sizeof(padding), MSG_DONTWAIT)) > 0)
		queued_bytes += sent;
	/* The queue is full as well: make room for what counts. */
	if (setsockopt(tcp[0], SOL_SOCKET, SO_SNDBUFFORCE, &large, sizeof(large)))
		return failed("SO_SNDBUFFORCE");
	done_or_failed(send(tcp[0], pointer(command, 1), bytes(command, 2),
			    MSG_ZEROCOPY | MSG_DONTWAIT), "send");
}

/* receive PAGES: read all that was queued, until the kernel says that it has let the pages go */
static void do_receive(const struct command *command)
{
	static char buffer[65536];
	struct msghdr message = { 0 };
	size_t left = queued_bytes + bytes(command, 1);

	while (left) {
		ssize_t got = recv(tcp[1], buffer, left < sizeof(buffer) ? left : sizeof(buffer), 0);

		if (got <= 0)
			return failed("recv");
		left -= got;
	}
	/* One notice on the error queue; it comes with the acknowledgement. */
	while (recvmsg(tcp[0], &message, MSG_ERRQUEUE) < 0) {
		if (errno != EAGAIN)
			return failed("recvmsg");
		usleep(1000);
	}
	done();
}

static struct {
	pthread_t thread;
	int file;
	void *start;
	size_t length;
	ssize_t result;
} direct;

static void *read_directly(void *unused)
{
	direct.result = pread(direct.file, direct.start, direct.length, 0);
	return unused;
}

/* direct PATH ADDRESS PAGES: an O_DIRECT read into the pages, by a thread */
static void do_direct(const struct command *command)
{
	direct.file = open(command->word[1], O_RDONLY | O_DIRECT);
	direct.start = pointer(command, 2);
	direct.length = bytes(command, 3);
	if (direct.file < 0)
		return failed("open");
	errno = pthread_create(&direct.thread, NULL, read_directly, NULL);
	done_or_failed(-errno, "pthread_create");
}

/* wait: until the direct read is done; answers the bytes read */
static void do_wait(const struct command *command)
{
	(void)command;
	pthread_join(direct.thread, NULL);
	close(direct.file);
	done_or_failed(direct.result, "pread");
}
