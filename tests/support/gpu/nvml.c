/* A stand-in for libnvidia-ml.so.1, for tests on machines without a GPU.
 *
 * Every answer is a small text file below $NIGHTLAB_STUB_NVML: `0/uuid`, `0/memory_used`, `0/mig/1/uuid`, … A file that
 * is not there is a thing the card does not offer; `!15` is NVML's error 15; `~3` hangs for 3 s and fails. `xids` holds one `INDEX XID` a line, each told
 * once. `event_sets` is how many are open; `event_set` and `0/register` only fail. `0/mig/` puts a GPU in MIG mode. `0/limit` is written when a control group's memory is bounded. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10 };
typedef struct { char path[64]; } Device;
typedef unsigned long long Number;

static Device devices[64];

static void place(char *path, const char *device, const char *field) {
    const char *root = getenv("NIGHTLAB_STUB_NVML");
    snprintf(path, 512, "%s/%s%s%s", root ? root : "/nonexistent", device, *device ? "/" : "", field);
}

static int text(const char *device, const char *field, char *out, size_t size) {
    char path[512];
    place(path, device, field);
    FILE *file = fopen(path, "r");
    if (!file) return UNSUPPORTED;
    size_t got = fread(out, 1, size - 1, file);
    fclose(file);
    while (got && out[got - 1] == '\n') got--;
    out[got] = 0;
    if (out[0] == '~') sleep(atoi(out + 1));
    return out[0] == '!' || out[0] == '~' ? atoi(out + 1) : OK;
}

static int number(const char *device, const char *field, Number *out) {
    char said[64];
    int code = text(device, field, said, sizeof said);
    if (code == OK) *out = strtoull(said, NULL, 10);
    return code;
}

static int small(const Device *device, const char *field, unsigned *out) {
    Number wide = 0;
    int code = number(device->path, field, &wide);
    if (code == OK) *out = (unsigned)wide;
    return code;
}

static int exists(const char *device, const char *field) {
    char path[512];
    struct stat about;
    place(path, device, field);
    return stat(path, &about) == 0;
}

static Device *device(const char *path) {
    int free = 0;
    while (devices[free].path[0] && strcmp(devices[free].path, path)) free++;
    snprintf(devices[free].path, sizeof devices[free].path, "%s", path);
    return &devices[free];
}

static int open_device(const char *path, Device **out) {
    char said[128];
    if (!exists(path, "uuid")) return NOT_FOUND;
    int code = text(path, "handle", said, sizeof said);  /* only there to hold an error */
    *out = device(path);
    return code == UNSUPPORTED ? OK : code;
}

int nvmlInitWithFlags(unsigned flags) {
    char said[64];
    (void)flags;
    int code = text("", "init", said, sizeof said);
    return code == UNSUPPORTED ? OK : code;
}
int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int code) {
    static char words[40];
    snprintf(words, sizeof words, "stand-in error %d", code);
    return words;
}

int nvmlSystemGetDriverVersion(char *out, unsigned size) { return text("", "driver_version", out, size); }

int nvmlDeviceGetCount_v2(unsigned *count) {
    char path[16];
    for (*count = 0;; ++*count) {
        snprintf(path, sizeof path, "%u", *count);
        if (!exists(path, "uuid")) return OK;
    }
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **out) {
    char path[16];
    snprintf(path, sizeof path, "%u", index);
    return open_device(path, out);
}
int nvmlDeviceGetMigDeviceHandleByIndex(Device *whole, unsigned index, Device **out) {
    char path[128];
    snprintf(path, sizeof path, "%s/mig/%u", whole->path, index);
    return open_device(path, out);
}

static int is_called(const char *path, const char *uuid) {
    char said[128];
    return text(path, "uuid", said, sizeof said) == OK && !strcmp(said, uuid);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Device **out) {
    char path[64];
    for (int index = 0; index < 16; index++) {
        snprintf(path, sizeof path, "%d", index);
        if (is_called(path, uuid)) return open_device(path, out);
        for (int instance = 0; instance < 8; instance++) {
            snprintf(path, sizeof path, "%d/mig/%d", index, instance);
            if (is_called(path, uuid)) return open_device(path, out);
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(Device *of, char *out, unsigned size) { return text(of->path, "uuid", out, size); }
int nvmlDeviceGetName(Device *of, char *out, unsigned size) { return text(of->path, "name", out, size); }
int nvmlDeviceGetMinorNumber(Device *of, unsigned *out) { return small(of, "minor", out); }
int nvmlDeviceGetPowerUsage(Device *of, unsigned *out) { return small(of, "power_mw", out); }
int nvmlDeviceGetTotalEnergyConsumption(Device *of, Number *out) { return number(of->path, "energy_mj", out); }
int nvmlDeviceGetCurrentClocksEventReasons(Device *of, Number *out) { return number(of->path, "throttle", out); }
int nvmlDeviceGetGpuInstanceId(Device *of, unsigned *out) { return small(of, "gi", out); }
int nvmlDeviceGetComputeInstanceId(Device *of, unsigned *out) { return small(of, "ci", out); }
int nvmlDeviceGetClockInfo(Device *of, int kind, unsigned *out) {
    return small(of, kind == 1 ? "sm_clock" : "memory_clock", out);
}
int nvmlDeviceGetTotalEccErrors(Device *of, int type, int counter, Number *out) {
    (void)type, (void)counter;
    return number(of->path, "ecc", out);
}

typedef struct { unsigned version; int sensor; int temperature; } Temperature;
int nvmlDeviceGetTemperatureV(Device *of, Temperature *out) { return small(of, "temperature", (unsigned *)&out->temperature); }

typedef struct { unsigned version; Number total, reserved, free, used; } Memory;
int nvmlDeviceGetMemoryInfo_v2(Device *of, Memory *out) {
    int code = number(of->path, "memory_used", &out->used);
    if (code == OK) code = number(of->path, "memory_total", &out->total);
    out->reserved = 0;
    out->free = out->total - out->used;
    return code;
}

typedef struct { unsigned gpu, memory; } Utilization;
int nvmlDeviceGetUtilizationRates(Device *of, Utilization *out) {
    out->memory = 0;
    return small(of, "utilisation", &out->gpu);
}

int nvmlDeviceGetMigMode(Device *of, unsigned *now, unsigned *pending) {
    *now = *pending = exists(of->path, "mig");
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(Device *of, unsigned *out) {
    (void)of;
    *out = 8;
    return OK;
}

typedef struct { unsigned pid; Number used; unsigned gi, ci; } Process;
static int processes(Device *of, const char *name, unsigned *count, Process *out) {
    char said[4096] = "", *line, *rest;
    unsigned found = 0, room = *count;
    int code = text(of->path, name, said, sizeof said);
    if (code != OK) return code;
    for (line = strtok_r(said, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        Process process = {0, 0, 0, 0};
        if (sscanf(line, "%u %llu", &process.pid, &process.used) != 2) continue;
        if (found < room && out) out[found] = process;
        found++;
    }
    *count = found;
    return found > room ? TOO_SMALL : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Device *of, unsigned *count, Process *out) { return processes(of, "processes", count, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *of, unsigned *count, Process *out) { return processes(of, "drawing", count, out); }

typedef struct { unsigned id, scope; long long timestamp, latency; int type, code; union { unsigned number; Number wide; } value; } Field;
int nvmlDeviceGetFieldValues(Device *of, int count, Field *fields) {
    for (int i = 0; i < count; i++)
        fields[i].code = fields[i].id == 230 ? small(of, "recovery", &fields[i].value.number) : UNSUPPORTED;
    return OK;
}

typedef struct { Device *device; Number type, data; unsigned gi, ci; } Event;
static void count_sets(int change) {
    static int sets;
    char path[512];
    place(path, "", "event_sets");
    FILE *file = fopen(path, "w");
    if (!file) return;
    fprintf(file, "%d\n", sets += change);
    fclose(file);
}
int nvmlEventSetCreate(void **set) {
    Number error = 0;
    if (number("", "event_set", &error) > NOT_FOUND) return number("", "event_set", &error);
    *set = calloc(64, sizeof(Device *));
    count_sets(1);
    return OK;
}
int nvmlEventSetFree(void *set) { free(set); count_sets(-1); return OK; }
int nvmlDeviceRegisterEvents(Device *of, Number types, void *set) {
    Device **registered = set;
    Number error = 0;
    (void)types;
    if (number(of->path, "register", &error) > NOT_FOUND) return number(of->path, "register", &error);
    while (*registered) registered++;
    *registered = of;
    return OK;
}
int nvmlEventSetWait_v2(void *set, Event *out, unsigned timeout) {
    char path[512], said[4096] = "", index[16];
    unsigned xid;
    Device **registered = set;
    (void)timeout;
    if (text("", "xids", said, sizeof said) != OK) return TIMEOUT;
    for (char *line = said; line && sscanf(line, "%15s %u", index, &xid) == 2; line = strchr(line, '\n')) {
        if (*line == '\n') line++;
        for (int i = 0; registered[i]; i++) {
            if (strcmp(registered[i]->path, index)) continue;
            char *end = strchr(line, '\n');
            place(path, "", "xids");
            FILE *file = fopen(path, "w");
            if (file) {  /* everything but this line */
                fwrite(said, 1, line - said, file);
                if (end) fputs(end + 1, file);
                fclose(file);
            }
            memset(out, 0, sizeof *out);
            out->device = registered[i];
            out->type = 8;
            out->data = xid;
            return OK;
        }
    }
    return TIMEOUT;
}

typedef struct { const char *cgroup; Number soft, hard; } SetLimits;
typedef struct { const char *cgroup; Number soft, hard, used; } GetLimits;
int nvmlDeviceSetMemoryLimits_v1(Device *of, const SetLimits *limits) {
    char path[512], said[64];
    if (text(of->path, "kernel_limits", said, sizeof said) != OK) return UNSUPPORTED;
    place(path, of->path, "limit");
    FILE *file = fopen(path, "w");
    if (!file) return 4;
    fprintf(file, "%s %llu %llu\n", limits->cgroup, limits->soft, limits->hard);
    fclose(file);
    return OK;
}
int nvmlDeviceGetMemoryLimits_v1(Device *of, GetLimits *limits) {
    char said[1024], cgroup[512];
    if (text(of->path, "limit", said, sizeof said) != OK) return UNSUPPORTED;
    return sscanf(said, "%511s %llu %llu", cgroup, &limits->soft, &limits->hard) == 3 ? OK : INVALID;
}
