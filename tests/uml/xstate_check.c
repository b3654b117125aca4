/*
 * Writes the extended processor state of a traced child: all of it, then only the first part. Prints what came of each, a
 * line each, for the test that runs this with and without the library of xstate.c.
 */
#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* The standard format: legacy area, header, and then the upper halves of the 256-bit registers. */
enum { XMM = 160, XMM_SIZE = 256, HEADER = 512, FIRST = 576, YMM_SIZE = 256 };

static pid_t child;

static size_t get(unsigned char *area, size_t size)
{
	struct iovec iov = { area, size };
	if (ptrace(PTRACE_GETREGSET, child, (void *)NT_X86_XSTATE, &iov) < 0) {
		perror("PTRACE_GETREGSET");
		exit(1);
	}
	return iov.iov_len;
}

static const char *set(unsigned char *area, size_t size)
{
	struct iovec iov = { area, size };
	return ptrace(PTRACE_SETREGSET, child, (void *)NT_X86_XSTATE, &iov) < 0 ? strerror(errno) : "written";
}

int main(void)
{
	static unsigned char area[64 << 10], wanted[64 << 10], found[64 << 10];

	child = fork();
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		_exit(0);
	}
	waitpid(child, NULL, 0);

	size_t size = get(area, sizeof(area));
	if (size < FIRST + YMM_SIZE) {
		printf("small: %zu bytes\n", size);
		return 0;
	}
	/* Both parts of the 256-bit registers are in use, and no value is one that a register has by itself. */
	area[HEADER] |= 6;
	memset(area + XMM, 0x11, XMM_SIZE);
	memset(area + FIRST, 0x22, YMM_SIZE);
	memcpy(wanted, area, size);
	printf("all: %s", set(area, size));
	get(found, sizeof(found));
	printf(", %s\n", memcmp(found, wanted, size) ? "changed" : "same");

	/* Bytes beyond the first part are not to be looked at. */
	memset(area + XMM, 0x33, XMM_SIZE);
	memset(area + FIRST, 0x44, size - FIRST);
	const char *result = set(area, FIRST);
	get(found, sizeof(found));
	memset(wanted + XMM, 0x33, XMM_SIZE);
	printf("first part: %s, first %s, rest %s\n", result, memcmp(found, wanted, FIRST) ? "differs" : "as written",
	       memcmp(found + FIRST, wanted + FIRST, size - FIRST) ? "differs" : "kept");

	/* What the kernel refuses for another reason is refused. */
	area[HEADER + 8 + 8] = 1;
	printf("bad header: %s\n", set(area, size));
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	printf("no process: %s\n", set(area, FIRST));
	return 0;
}
