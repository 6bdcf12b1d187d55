/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The init of a guest that runs programs and says what became of them on its console. It loads
 * /modules/0.ko, 1.ko ..., then obeys /commands, a line each:
 *
 *   mount SOURCE DIRECTORY TYPE OPTIONS   made if it is not there; OPTIONS may be -
 *   write FILE TEXT                       once it is there
 *   run NAME PROGRAM ARGUMENT...
 *
 * prints "[BEGIN NAME]" before a program's output and "[END NAME CODE]" after it (128 and the
 * number for a signal), "[DONE]" at the end, and switches the guest off.
 */
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define WORDS_MAX 32
#define RUN_LIMIT_S 100 /* without an end in sight; counted anew when a process ends */

static void load_modules(void)
{
    char path[32];

    for (unsigned i = 0;; i++) {
        snprintf(path, sizeof(path), "/modules/%u.ko", i);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0))
            printf("%s: %s\n", path, strerror(errno));
        close(fd);
    }
}

static void raise_loopback(void)
{
    struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &lo) != 0)
        printf("lo: %s\n", strerror(errno));
    close(fd);
}

static void mount_at(const char *source, const char *directory, const char *type,
                     const char *options)
{
    mkdir(directory, 0755);
    /* A device may need a moment after its module was loaded. */
    for (unsigned i = 0; i < 200; i++) {
        if (mount(source, directory, type, 0, strcmp(options, "-") ? options : NULL) == 0)
            return;
        if (errno != ENOENT && errno != ENXIO)
            break;
        usleep(50000);
    }
    printf("mount %s on %s (%s): %s\n", source, directory, options, strerror(errno));
}

static void write_to(const char *path, const char *text)
{
    ssize_t length = -1;

    for (unsigned i = 0; length < 0 && i < 100; i++) {
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        length = fd >= 0 ? write(fd, text, strlen(text)) : -1;
        int code = errno;
        if (fd >= 0)
            close(fd);
        errno = code;
        if (length < 0)
            usleep(50000);
        errno = code;
    }
    if (length < 0)
        printf("write %s to %s: %s\n", text, path, strerror(errno));
}

/** await() - the end of @child, which is put to it after a while. */
static void await(pid_t child, int *status)
{
    struct timespec limit = {.tv_sec = RUN_LIMIT_S};
    sigset_t ended;

    sigemptyset(&ended);
    sigaddset(&ended, SIGCHLD);
    for (;;) {
        /* As init, the orphans are ours too. */
        for (pid_t pid; (pid = waitpid(-1, status, WNOHANG)) > 0;)
            if (pid == child)
                return;
        if (sigtimedwait(&ended, NULL, &limit) < 0 && errno == EAGAIN) {
            printf("not over within %d s\n", RUN_LIMIT_S);
            kill(-child, SIGKILL);
        }
    }
}

static void run(const char *name, char **argv)
{
    int status = 0;

    printf("[BEGIN %s]\n", name);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        sigset_t none;
        setsid();
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        execv(argv[0], argv);
        printf("%s: %s\n", argv[0], strerror(errno));
        fflush(stdout);
        _exit(127);
    }
    await(child, &status);
    printf("[END %s %d]\n", name, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    fflush(stdout);
}

static void obey(char *line)
{
    char *words[WORDS_MAX + 1] = {NULL}, *rest = NULL;
    unsigned count = 0;

    for (char *word = strtok_r(line, " \n", &rest); word && count < WORDS_MAX;
         word = strtok_r(NULL, " \n", &rest))
        words[count++] = word;
    if (count == 5 && strcmp(words[0], "mount") == 0)
        mount_at(words[1], words[2], words[3], words[4]);
    else if (count == 3 && strcmp(words[0], "write") == 0)
        write_to(words[1], words[2]);
    else if (count >= 3 && strcmp(words[0], "run") == 0)
        run(words[1], words + 2);
    else if (count)
        printf("not a command: %s\n", words[0]);
}

int main(void)
{
    char line[1024];
    sigset_t ended;

    sigemptyset(&ended);
    sigaddset(&ended, SIGCHLD);
    sigprocmask(SIG_BLOCK, &ended, NULL);
    mount_at("none", "/proc", "proc", "-");
    mount_at("none", "/sys", "sysfs", "-");
    mount_at("none", "/dev", "devtmpfs", "-");
    mount_at("none", "/dev/shm", "tmpfs", "-");
    mount_at("none", "/tmp", "tmpfs", "-");
    setenv("PATH", "/bin", 1);
    raise_loopback();
    load_modules();
    FILE *commands = fopen("/commands", "re");
    while (commands && fgets(line, sizeof(line), commands))
        obey(line);
    puts("[DONE]");
    fflush(stdout);
    sync();
    tcdrain(STDOUT_FILENO);
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}
