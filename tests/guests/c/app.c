// A small handler in C, for the tests of the host: every function of the contract, every outcome, by the task's kind. Its data has no parameters
// that would need a JSON parser: where a kind takes one, it is the route's setting of that name, or the text of the data itself.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin.h"

typedef exports_laelaps_worker_handler_task_t task_t;
typedef exports_laelaps_worker_handler_outcome_t outcome_t;
typedef exports_laelaps_worker_handler_failure_t failure_t;

static bool is(const plugin_string_t *text, const char *other) {
  return text->len == strlen(other) && memcmp(text->ptr, other, text->len) == 0;
}

// A string that is only lent to a call.
static plugin_string_t lent(const char *text) {
  plugin_string_t string = {.ptr = (uint8_t *)text, .len = strlen(text)};
  return string;
}

// The outcome owns its bytes; the bindings free them after the host has read them.
static bool finish(outcome_t *outcome, const void *output, size_t length) {
  outcome->tag = LAELAPS_WORKER_TYPES_OUTCOME_FINISH;
  outcome->val.finish.output.is_some = true;
  outcome->val.finish.output.val.ptr = malloc(length > 0 ? length : 1);
  outcome->val.finish.output.val.len = length;
  memcpy(outcome->val.finish.output.val.ptr, output, length);
  outcome->val.finish.retention.is_some = false;
  return true;
}

static bool fail(failure_t *failure, uint8_t kind, const char *code, const char *message) {
  failure->kind = kind;
  plugin_string_dup(&failure->code, code);
  plugin_string_dup(&failure->message, message);
  return false;
}

static bool refused(failure_t *failure, laelaps_worker_context_refusal_t *refusal) {
  failure->kind = LAELAPS_WORKER_TYPES_FAILURE_KIND_REJECT;
  failure->code = refusal->code;
  failure->message = refusal->message;
  return false;
}

static bool describe(const task_t *task, outcome_t *outcome) {
  uint64_t deadline = 0;
  uint32_t most = 0;
  bool has_deadline = laelaps_worker_context_deadline(&deadline);
  bool has_most = laelaps_worker_context_max_attempts(&most);
  plugin_string_t name = lent("greeting"), greeting = {NULL, 0};
  bool has_greeting = laelaps_worker_context_setting(&name, &greeting);
  plugin_list_tuple2_string_string_t settings;
  laelaps_worker_context_settings(&settings);
  char text[2048];
  int length = snprintf(text, sizeof text,
                        "{\"key\":\"%.*s\",\"kind\":\"%.*s\",\"data\":%.*s,\"user\":\"%.*s\",\"attempt\":%u,\"created_at\":%llu,"
                        "\"deadline\":%llu,\"max_attempts\":%u,\"settings\":%u,\"setting\":\"%.*s\"}",
                        (int)task->key.len, (char *)task->key.ptr, (int)task->kind.len, (char *)task->kind.ptr, (int)task->data.len,
                        (char *)task->data.ptr, task->user.is_some ? (int)task->user.val.len : 0,
                        task->user.is_some ? (char *)task->user.val.ptr : "", (unsigned)task->attempt,
                        (unsigned long long)laelaps_worker_context_created_at(), has_deadline ? (unsigned long long)deadline : 0,
                        has_most ? (unsigned)most : 0, (unsigned)settings.len, has_greeting ? (int)greeting.len : 0,
                        has_greeting ? (char *)greeting.ptr : "");
  plugin_list_tuple2_string_string_free(&settings);
  if (has_greeting) plugin_string_free(&greeting);
  return finish(outcome, text, length < (int)sizeof text ? (size_t)length : sizeof text - 1);
}

static bool submit(const task_t *task, outcome_t *outcome, failure_t *failure) {
  char text[300];
  snprintf(text, sizeof text, "%.*s-next", (int)task->key.len, (char *)task->key.ptr);
  plugin_string_t key = lent(text), kind = lent("silent");
  laelaps_worker_context_own_submission_t submission = laelaps_worker_context_constructor_submission(&key, &kind);
  laelaps_worker_context_borrow_submission_t it = laelaps_worker_context_borrow_submission(submission);
  laelaps_worker_context_method_submission_compression(it, LAELAPS_WORKER_CONTEXT_COMPRESSION_GZIP);
  plugin_list_u8_t data = {task->data.ptr, task->data.len};
  laelaps_worker_context_refusal_t refusal;
  bool taken = laelaps_worker_context_method_submission_submit(it, &data, &refusal);
  laelaps_worker_context_submission_drop_own(submission);
  if (!taken) return refused(failure, &refusal);
  return finish(outcome, "{\"submitted\":1}", 15);
}

static bool heartbeat(outcome_t *outcome) {
  laelaps_worker_context_progress_t progress = {.done = 1, .total = {.is_some = true, .val = 2}, .note = lent("half")};
  bool held = laelaps_worker_context_heartbeat(&progress, NULL);
  return held ? finish(outcome, "{\"held\":true}", 13) : finish(outcome, "{\"held\":false}", 14);
}

static bool handle(const task_t *task, outcome_t *outcome, failure_t *failure) {
  const plugin_string_t *kind = &task->kind;
  if (is(kind, "echo")) return finish(outcome, task->data.ptr, task->data.len);
  if (is(kind, "silent")) {
    memset(outcome, 0, sizeof *outcome);
    outcome->tag = LAELAPS_WORKER_TYPES_OUTCOME_FINISH;
    return true;
  }
  if (is(kind, "retry") || is(kind, "release")) {
    outcome->tag = is(kind, "retry") ? LAELAPS_WORKER_TYPES_OUTCOME_RETRY : LAELAPS_WORKER_TYPES_OUTCOME_RELEASE;
    outcome->val.retry.is_some = is(kind, "retry");
    outcome->val.retry.val = 10;
    return true;
  }
  if (is(kind, "fail")) return fail(failure, LAELAPS_WORKER_TYPES_FAILURE_KIND_RETRY, "on-purpose", "the task asked for this failure");
  if (is(kind, "reject")) return fail(failure, LAELAPS_WORKER_TYPES_FAILURE_KIND_REJECT, "on-purpose", "the task asked for this failure");
  if (is(kind, "abort")) abort();
  if (is(kind, "describe")) return describe(task, outcome);
  if (is(kind, "submit")) return submit(task, outcome, failure);
  if (is(kind, "heartbeat")) return heartbeat(outcome);
  if (is(kind, "update")) {
    plugin_list_u8_t members = {task->data.ptr, task->data.len};
    laelaps_worker_context_refusal_t refusal;
    if (!laelaps_worker_context_update_data(&members, &refusal)) return refused(failure, &refusal);
    return finish(outcome, task->data.ptr, task->data.len);
  }
  if (is(kind, "wait-cancelled")) {
    laelaps_worker_context_cancellation_t reason;
    while (!laelaps_worker_context_is_cancelled(&reason)) {
    }
    outcome->tag = LAELAPS_WORKER_TYPES_OUTCOME_RELEASE;
    outcome->val.release.is_some = false;
    return true;
  }
  return fail(failure, LAELAPS_WORKER_TYPES_FAILURE_KIND_REJECT, "no-such-kind", "this handler has no such kind");
}

bool exports_laelaps_worker_handler_handle(task_t *task, outcome_t *outcome, failure_t *failure) {
  char text[300];
  snprintf(text, sizeof text, "%.*s attempt %u", (int)task->key.len, (char *)task->key.ptr, (unsigned)task->attempt);
  plugin_string_t line = lent(text);
  laelaps_worker_log_log(LAELAPS_WORKER_LOG_LEVEL_INFO, &line);
  bool went_well = handle(task, outcome, failure);
  // The generated ..._task_free leaves list<u8> alone: it is freed here by hand.
  plugin_list_u8_free(&task->data);
  exports_laelaps_worker_handler_task_free(task);
  return went_well;
}
