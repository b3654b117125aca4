/*
 * Preloaded for linux.uml only: its writes of a process's extended processor state succeed on every processor.
 *
 * The host's kernel takes PTRACE_SETREGSET of NT_X86_XSTATE for the whole area only and answers EFAULT to a shorter one
 * (arch/x86/kernel/fpu/regset.c: xstateregs_set). user-mode-linux 6.1 has 2696 bytes for it, and a processor with AMX has
 * about 11 KiB. So a write that fails and is too short becomes: read all of it, replace the first part, write all of it.
 * A write that succeeds is passed on as it is, and so is every other request.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

static long (*next_ptrace)(enum __ptrace_request, pid_t, void *, void *);

/* Before user-mode-linux starts, which has its own stacks and its own malloc. */
__attribute__((constructor)) static void find_next(void)
{
	next_ptrace = (long (*)(enum __ptrace_request, pid_t, void *, void *))dlsym(RTLD_NEXT, "ptrace");
}

static long write_all(pid_t pid, const struct iovec *first)
{
	/* Not on the stack: user-mode-linux's are small. It has one processor, so there is one call at a time. */
	static char area[64 << 10] __attribute__((aligned(64)));
	struct iovec all = { .iov_base = area, .iov_len = sizeof(area) };
	void *type = (void *)NT_X86_XSTATE;

	if (next_ptrace(PTRACE_GETREGSET, pid, type, &all) < 0)
		return -1;
	if (first->iov_len >= all.iov_len || all.iov_len == sizeof(area)) {
		errno = EFAULT;
		return -1;
	}
	memcpy(area, first->iov_base, first->iov_len);
	return next_ptrace(PTRACE_SETREGSET, pid, type, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	pid_t pid = va_arg(arguments, pid_t);
	void *address = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);

	long result = next_ptrace(request, pid, address, data);
	if (result < 0 && errno == EFAULT && request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE)
		return write_all(pid, data);
	return result;
}
