// Releases the worker and removes the builder and the keys. A failure here never fails the job: the lease ends by
// itself at its ttl.
'use strict'

const fs = require('node:fs')
const path = require('node:path')
const { environment, run, say } = require('./runner.js')

const GONE = [5, 7] // bkpool's exit codes for an unknown lease, and for one that has ended

async function main() {
  const directory = process.env.STATE_directory
  if (!directory || !fs.existsSync(directory)) return
  try {
    if (fs.existsSync(path.join(directory, 'builder'))) await removeBuilder(directory)
    if (fs.existsSync(path.join(directory, 'lease.json'))) await release(directory)
  } finally {
    fs.rmSync(directory, { recursive: true, force: true })
  }
}

async function removeBuilder(directory) {
  const builder = fs.readFileSync(path.join(directory, 'builder'), 'utf8').trim()
  await run('docker', ['buildx', 'rm', '--force', builder], process.env).catch(() => {})
}

async function release(directory) {
  const { code } = await run('bkpool', ['release', '--token', directory], environment(directory))
  if (code === 0 || GONE.includes(code)) console.log('the worker is released')
  else throw new Error(`bkpool ended with exit code ${code}`)
}

main().catch((error) => say('warning', `the worker is not released; its lease lasts until its ttl ends: ${error.message}`))
