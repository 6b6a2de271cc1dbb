// Prints how many empty jobs a second graphile-worker runs: DATABASE_URL, number of jobs. Its best settings, as its own documentation and
// measurements have them: a local queue, completions in batches, no log.
import { Logger, makeWorkerUtils, run } from "graphile-worker";
import pg from "pg";

const [connectionString, count] = [process.argv[2], Number(process.argv[3])];
const logger = new Logger(() => () => {});

const utils = await makeWorkerUtils({ connectionString, logger });
await utils.migrate();
await utils.release();
const client = new pg.Client({ connectionString });
await client.connect();
// In transactions of a thousand: in a single one, each job looks at every earlier version of its task's row.
for (let added = 0; added < count; added += 1000) {
  await client.query(
    `SELECT graphile_worker.add_job('nothing', json_build_object('payload', repeat('x', 86))) FROM generate_series(1, $1)`,
    [Math.min(1000, count - added)],
  );
}
await client.query("VACUUM ANALYZE");

// From a tenth on, so that no start is measured.
let done = 0;
let begun;
const from = Math.floor(count / 10);
let finish;
const finished = new Promise((resolve) => { finish = resolve; });
const runner = await run({
  taskList: {
    nothing: () => {
      done += 1;
      if (done === from) begun = performance.now();
      if (done === count) finish();
    },
  },
  preset: {
    worker: {
      connectionString,
      concurrentJobs: 24,
      maxPoolSize: 26,
      localQueue: { size: 500 },
      completeJobBatchDelay: 1,
      failJobBatchDelay: 1,
    },
  },
  logger,
  noHandleSignals: true,
});
await finished;
for (;;) {
  const { rows } = await client.query("SELECT EXISTS (SELECT FROM graphile_worker.jobs) AS left");
  if (!rows[0].left) break;
}
const seconds = (performance.now() - begun) / 1000;
console.log(Math.round((count - from) / seconds));
await runner.stop();
await client.end();
