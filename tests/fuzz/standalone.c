/* Runs a fuzz target without libFuzzer: first the kept corpus as it is, then changes of it until so many seconds have passed. For CI,
 * and for machines without clang; what it is given is told by the seed.
 *
 *     fuzz_NAME CORPUS SECONDS [SEED]
 *
 * An input that crashes is in ./build/fuzz/standalone-crash then. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *, size_t);
__attribute__((weak)) int LLVMFuzzerInitialize(int *, char ***);

enum { INPUTS = 4096, LONGEST = 65536, CHANGES = 6 };

static struct {
    uint8_t *data;
    size_t n;
} corpus[INPUTS];
static size_t count;
static uint64_t state;
/* In a file that is mapped, so that it holds the input whatever ends the process. Its length stands before it. */
static uint8_t *current;

static uint64_t next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static size_t below(size_t n)
{
    return n ? (size_t)(next() % n) : 0;
}

static void read_corpus(const char *folder)
{
    DIR *dir = opendir(folder);
    if (!dir) {
        perror(folder);
        exit(2);
    }
    for (struct dirent *e; (e = readdir(dir)) && count < INPUTS;) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        FILE *file = e->d_name[0] == '.' ? NULL : fopen(path, "rb");
        if (!file)
            continue;
        corpus[count].data = malloc(LONGEST);
        if (!corpus[count].data)
            exit(2);
        corpus[count].n = fread(corpus[count].data, 1, LONGEST, file);
        fclose(file);
        count++;
    }
    closedir(dir);
    if (!count) {
        fprintf(stderr, "%s: no corpus\n", folder);
        exit(2);
    }
}

static void run(size_t n)
{
    memcpy(current, &n, sizeof n);
    /* On the heap and of its own length, so that a read past its end is seen. */
    uint8_t *copy = malloc(n ? n : 1);
    if (!copy)
        exit(2);
    memcpy(copy, current + sizeof n, n);
    LLVMFuzzerTestOneInput(copy, n);
    free(copy);
}

/* One change of the n bytes at p; their new number. */
static size_t change(uint8_t *p, size_t n)
{
    static const uint8_t edges[] = {0, 1, 2, 3, 0x40, 0x7f, 0x80, 0xfe, 0xff};
    size_t at = below(n), m;
    switch (below(6)) {
    case 0: /* a bit */
        if (n)
            p[at] ^= (uint8_t)(1u << below(8));
        return n;
    case 1: /* a byte at an edge */
        if (n)
            p[at] = edges[below(sizeof edges)];
        return n;
    case 2: /* less */
        m = below(n - at);
        memmove(p + at, p + at + m, n - at - m);
        return n - m;
    case 3: /* twice */
        m = below(n - at);
        if (n + m > LONGEST)
            return n;
        memmove(p + at + m, p + at, n - at);
        return n + m;
    case 4: { /* a piece of another input */
        size_t other = below(count), from = below(corpus[other].n);
        m = below(corpus[other].n - from);
        if (at + m > LONGEST)
            return n;
        memcpy(p + at, corpus[other].data + from, m);
        return at + m > n ? at + m : n;
    }
    default: /* another input behind it */
        m = below(count);
        if (n + corpus[m].n > LONGEST)
            return n;
        memcpy(p + n, corpus[m].data, corpus[m].n);
        return n + corpus[m].n;
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: %s CORPUS SECONDS [SEED]\n", argv[0]);
        return 2;
    }
    uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : (uint64_t)time(NULL);
    state = seed * 0x9e3779b97f4a7c15 + 1;
    int fd = open("build/fuzz/standalone-crash", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(size_t) + LONGEST) < 0 ||
        (current = mmap(NULL, sizeof(size_t) + LONGEST, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED) {
        perror("build/fuzz/standalone-crash");
        return 2;
    }
    if (LLVMFuzzerInitialize)
        LLVMFuzzerInitialize(&argc, &argv);
    read_corpus(argv[1]);
    unsigned long runs = 0;
    for (size_t i = 0; i < count; i++, runs++) {
        memcpy(current + sizeof(size_t), corpus[i].data, corpus[i].n);
        run(corpus[i].n);
    }
    for (double end = now() + strtod(argv[2], NULL); now() < end; runs++) {
        size_t from = below(count), n = corpus[from].n;
        memcpy(current + sizeof(size_t), corpus[from].data, n);
        for (size_t i = 1 + below(CHANGES); i > 0; i--)
            n = change(current + sizeof(size_t), n);
        run(n);
    }
    printf("%s: %lu runs from %zu inputs, seed %llu\n", strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0], runs, count,
           (unsigned long long)seed);
    return 0;
}
