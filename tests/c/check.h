/* What every test program uses: checks that say what failed, and a limit on hanging. */
#ifndef CHECK_H
#define CHECK_H
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *check_name = "";

#define CHECK(cond)                                                                                                    \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            fprintf(stderr, "%s:%d: %s: not true: %s (errno %d)\n", __FILE__, __LINE__, check_name, #cond, errno);     \
            fflush(NULL);                                                                                              \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

#define CHECK_EQ(have, want)                                                                                           \
    do {                                                                                                               \
        long long have_ = (long long)(have), want_ = (long long)(want);                                                \
        if (have_ != want_) {                                                                                          \
            fprintf(stderr, "%s:%d: %s: %s is %lld, not %lld\n", __FILE__, __LINE__, check_name, #have, have_, want_); \
            fflush(NULL);                                                                                              \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

#define CHECK_STR(have, want)                                                                                              \
    do {                                                                                                                   \
        const char *have_ = (have), *want_ = (want);                                                                       \
        if (strcmp(have_, want_)) {                                                                                        \
            fprintf(stderr, "%s:%d: %s: %s is \"%s\", not \"%s\"\n", __FILE__, __LINE__, check_name, #have, have_, want_); \
            fflush(NULL);                                                                                                  \
            _exit(1);                                                                                                      \
        }                                                                                                                  \
    } while (0)

/* A test that hangs is ended by SIGALRM, and its name has been printed. */
#define RUN(test)                                  \
    do {                                           \
        check_name = #test;                        \
        if (getenv("VERBOSE"))                     \
            fprintf(stderr, "  %s\n", check_name); \
        alarm(120);                                \
        test();                                    \
        alarm(0);                                  \
    } while (0)
#endif
