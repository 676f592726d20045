"""The `guided-decode` application: its commands, in the order in which help lists them."""

from guided_decode.cli.ablate.command import ablate
from guided_decode.cli.calibrate import calibrate
from guided_decode.cli.demo import demo
from guided_decode.cli.doctor.command import doctor
from guided_decode.cli.generate import generate
from guided_decode.cli.models import models
from guided_decode.cli.new_app import new_app
from guided_decode.cli.option_groups import grouped
from guided_decode.cli.plan import plan
from guided_decode.cli.report_card import report_card
from guided_decode.cli.rewardbench import rewardbench
from guided_decode.cli.score import score
from guided_decode.cli.scorer import scorer
from guided_decode.cli.search import search
from guided_decode.cli.serve import serve
from guided_decode.cli.trace import trace
from guided_decode.cli.train_critic import train_critic
from guided_decode.cli.vllm_options import PassingOn

app = new_app()
app.command()(demo)
app.command()(grouped(generate))
app.command()(grouped(search))
app.command(cls=PassingOn)(grouped(serve))
app.command()(grouped(scorer))
app.command()(grouped(score))
app.command()(grouped(rewardbench))
app.command()(grouped(train_critic))
app.command()(grouped(report_card))
app.command()(grouped(calibrate))
app.command()(grouped(trace))
app.command()(ablate)
app.command()(models)
app.command()(plan)
app.command()(doctor)
