// Leases a worker. What the post step needs is saved before the lease is made, so that it always finds the lease.
'use strict'

const crypto = require('node:crypto')
const fs = require('node:fs')
const path = require('node:path')
const { environment, input, run, say, tell } = require('./runner.js')

async function main() {
  const directory = fs.mkdtempSync(path.join(process.env.RUNNER_TEMP, 'bkpool-lease-')) // 0700
  const mark = crypto.randomBytes(4).toString('hex')
  tell('GITHUB_STATE', 'directory', directory)
  const { GITHUB_RUN_ID: run_id = 'run', GITHUB_JOB: job = 'job' } = process.env
  const { code, out } = await run('bkpool', [
    'allocate', '--json', '--out', directory,
    '--pool', input('pool') || 'default', '--namespace', input('namespace') || 'default',
    '--ttl', input('ttl') || '1h', ...(input('wait') ? ['--wait', input('wait')] : []),
    '--job-id', `${run_id}-${job}-${mark}`, // the jobs of a matrix have the same name, and each needs its own worker
  ], environment(directory))
  if (code !== 0) throw new Error(`no worker was leased: bkpool ended with exit code ${code}`)
  const lease = JSON.parse(out)
  say('add-mask', lease.token)
  tell('GITHUB_OUTPUT', 'gateway', lease.gatewayEndpoint)
  tell('GITHUB_OUTPUT', 'worker', lease.workerName)
  tell('GITHUB_OUTPUT', 'builder', input('builder') || `bkpool-${mark}`)
  tell('GITHUB_OUTPUT', 'directory', directory)
  console.log(`${lease.workerName} is leased until ${lease.expiresAt}`)
}

main().catch((error) => {
  say('error', error.message)
  process.exitCode = 1
})
